"""split_qkv: plain views in value and gradient, and no copy where the operator's backward packed dq, dk, dv."""

import pytest
import torch

from effvit._accuracy import assert_bitwise_equal
from effvit.layers._qkv import packed_buffer, split_qkv
from effvit.ops import window_attention

B, H, W, HEADS, DIM = 2, 5, 4, 3, 8
WIDTH = 3 * HEADS * DIM


def plain(qkv, heads=HEADS):
    return qkv.unflatten(-1, (3, heads, -1)).unbind(-3)


def make(seed=0, **kwargs):
    return torch.randn(B, H, W, WIDTH, generator=torch.Generator().manual_seed(seed), **kwargs)


def gradient(split, use, qkv):
    qkv = qkv.clone().requires_grad_()
    use(*split(qkv, HEADS)).backward()
    return qkv.grad


def test_values_are_views():
    qkv = make().requires_grad_()
    for ours, theirs in zip(split_qkv(qkv, HEADS), plain(qkv), strict=True):
        assert_bitwise_equal(ours, theirs)
        assert ours.data_ptr() == theirs.data_ptr() and ours.stride() == theirs.stride()


USES = {
    "all": lambda q, k, v: (q * k.sin() * v.cos()).sum(),
    "q alone": lambda q, k, v: q.square().sum(),
    "k and v": lambda q, k, v: (k * v).sum(),
    "one twice": lambda q, k, v: (q * q.flip(1) + k + v.exp()).sum(),
    "operator": lambda q, k, v: window_attention(q, k, v, window=3, shift=1)[0].square().sum(),
    "operator, q twice": lambda q, k, v: (window_attention(q, k, v, window=3)[0].square() + q * v).sum(),
    "operator twice": lambda q, k, v: (
        (window_attention(q, k, v, window=3)[0] * window_attention(k, q, v, window=2)[0]).sin().sum()
    ),
    "operator, v = q": lambda q, k, v: (window_attention(q, k, q, window=3)[0] * v).sum(),
    "operator, reordered": lambda q, k, v: window_attention(v, k, q, window=3)[0].square().sum(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_gradient_equals_that_of_plain_views(use):
    assert_bitwise_equal(gradient(split_qkv, use, make()), gradient(plain, use, make()))


def test_gradient_is_the_packed_buffer_of_the_operator():
    seen = {}
    qkv = make().requires_grad_()
    whole = qkv * 1  # not a leaf: .grad of a leaf may be a copy that autograd makes
    q, k, v = split_qkv(whole, HEADS)
    q.register_hook(lambda g: seen.__setitem__("dq", g.data_ptr()))
    whole.register_hook(lambda g: seen.__setitem__("dqkv", (g.data_ptr(), g.is_contiguous(), g.shape)))
    window_attention(q, k, v, window=3)[0].sum().backward()
    assert seen["dqkv"] == (seen["dq"], True, qkv.shape)


def test_packed_buffer_takes_nothing_else():
    def slices(t, heads=HEADS):
        return [s.unflatten(-1, (heads, -1)) for s in t.split(HEADS * DIM, -1)]

    good = make()
    found = packed_buffer(slices(good))
    assert_bitwise_equal(found, good)
    assert found.data_ptr() == good.data_ptr()
    q, k, v = slices(good)
    other = slices(make(1))
    half = make()[..., : WIDTH // 2]
    refused = {
        "order": [k, q, v],
        "repeated": [q, q, q],
        "another tensor": [q, k, other[2]],
        "copies": [t.clone() for t in (q, k, v)],
        "expanded": [t[:1].expand_as(t) for t in (q, k, v)],
        "a wider buffer": [s.unflatten(-1, (HEADS, -1)) for s in torch.cat([good, half], -1).split(24, -1)[:3]],
        "a batch slice of a wider map": slices(torch.cat([good, good], 2)[:, :, :W]),
        "shapes": [q, k, v[..., :4]],
        "empty": slices(good[:0]),
        "heads first": [t.transpose(3, 4) for t in (q, k, v)],
    }
    assert {name: packed_buffer(grads) is None for name, grads in refused.items()} == dict.fromkeys(refused, True)
    # A slice of the batch is itself a contiguous packed buffer, at an offset.
    assert_bitwise_equal(packed_buffer(slices(good[1:])), good[1:])


def test_without_gradient():
    qkv = make()
    assert not any(t.requires_grad for t in split_qkv(qkv, HEADS))
    with torch.no_grad():
        assert all(t.grad_fn is None for t in split_qkv(make().requires_grad_() * 1, HEADS))


def test_gradcheck_and_gradgradcheck():
    qkv = torch.randn(1, 2, 2, 6, dtype=torch.float64, requires_grad=True)

    def f(x):
        q, k, v = split_qkv(x, 2)
        return q * k.sin() + v.square()

    assert torch.autograd.gradcheck(f, qkv)
    assert torch.autograd.gradgradcheck(f, qkv)


def test_transforms_and_fake_tensors():
    qkv = make()
    loss = USES["all"]
    expected = gradient(plain, loss, qkv)
    got = torch.func.grad(lambda x: loss(*split_qkv(x, HEADS)))(qkv)
    assert_bitwise_equal(got, expected)
    stacked = torch.func.vmap(torch.func.grad(lambda x: loss(*split_qkv(x, HEADS))))(torch.stack([qkv, qkv]))
    assert_bitwise_equal(stacked, torch.stack([expected, expected]))
    with torch._subclasses.FakeTensorMode():
        fake = torch.randn(B, H, W, WIDTH).requires_grad_()
        loss(*split_qkv(fake, HEADS)).backward()
        assert fake.grad.shape == fake.shape


def test_compiled():
    compiled = torch.compile(lambda x: USES["operator"](*split_qkv(x, HEADS)), fullgraph=True, backend="aot_eager")
    qkv = make().requires_grad_()
    compiled(qkv).backward()
    assert_bitwise_equal(qkv.grad, gradient(plain, USES["operator"], make()))
