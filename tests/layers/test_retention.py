"""effvit.layers.MultiScaleRetention and ViRRetention against their formulas: all pairs, and token after token."""

import functools

import pytest
import torch
from gated_formulas import attend, pairs_reversed, recurrence, silu, wide
from layer_suite import DTYPES, check, check_everything_else, randomise, tokens

from effvit.layers import MultiScaleRetention, ViRRetention

SIZES = {"hidden_size": 24, "num_heads": 3}
L = 9


def retained(q, k, v, gamma, bidirectional=False):
    """sum_j gamma^(i-j) (q_i . k_j) v_j over the tokens before, or gamma^|i-j| over all: q and k [B, h, L, K]."""
    n = torch.arange(q.shape[2])
    distance = n[:, None] - n
    decay = gamma[:, None, None] ** distance.abs()
    return (q @ k.mT * (decay if bidirectional else decay * (distance >= 0))) @ v


def gated(scan, q, k, v, gamma, bidirectional=False):
    return attend(scan, q, k, v, gamma.log()[:, None, None], bidirectional)


FORMS = [functools.partial(gated, scan) for scan in (recurrence, pairs_reversed)]


def gammas(m, dtype):
    return torch.tensor([1 - 2.0 ** (-5 - h) for h in range(m.num_heads)], dtype=dtype)


def turned(x, kind, offset=0):
    """Channels of x [B, h, L, K] in twos as complex numbers, times exp(i position theta)."""
    K, L = x.shape[3], x.shape[2]
    i = torch.arange(K // 2, dtype=x.dtype)
    if kind == "half":
        a, b, theta = x[..., : K // 2], x[..., K // 2 :], 10000.0 ** (-2 * i / K)
    else:
        a, b, theta = x[..., 0::2], x[..., 1::2], 1 / 10000.0 ** torch.linspace(0, 1, K // 2, dtype=x.dtype)
    angles = (torch.arange(L, dtype=x.dtype) + offset)[:, None] * theta
    z = torch.complex(a, b) * torch.complex(angles.cos(), angles.sin())
    return torch.cat([z.real, z.imag], -1) if kind == "half" else torch.stack([z.real, z.imag], -1).flatten(-2)


def plain(m, x, form=retained):
    q, k, v = m.q_proj(x), m.k_proj(x), m.v_proj(x)
    K = m.key_dim // m.num_heads
    q, k = (t.unflatten(-1, (-1, K)).transpose(1, 2) for t in (q, k))
    if m.rotary is not None:
        q, k = (turned(wide(t), m.rotary).to(x.dtype) for t in (q, k))
    v = v.unflatten(-1, (-1, m.value_dim // m.num_heads)).transpose(1, 2)
    k, v = (t.repeat_interleave(m.num_heads // m.num_kv_heads, dim=1) for t in (k, v))
    y = form(*map(wide, (q, k, v)), gammas(m, wide(q).dtype), m.bidirectional) * K**-0.5
    y = m.g_norm_swish_gate(y.to(x.dtype).transpose(1, 2)).flatten(2)
    return m.o_proj(y * silu(m.g_proj(x)))


VARIANTS = {
    "fla's": {},
    "torchscale's rotations": {"rotary": "pairs", "elementwise_affine": False},
    "none, shared keys": {"rotary": None, "num_kv_heads": 1},
    "both directions": {"bidirectional": True, "expand_v": 1.0},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, dtype):
    m = randomise(MultiScaleRetention(**SIZES, **kwargs)).to(dtype)
    check(m, plain, tokens(2, L, 24, dtype=dtype), also=[functools.partial(plain, form=form) for form in FORMS])


def test_in_parts():
    """States and positions carry on; packed sequences start anew."""
    m, x = randomise(MultiScaleRetention(**SIZES), scale=0.2), tokens(2, L, 24)
    first, state = m(x[:, :4], return_state=True)
    torch.testing.assert_close(torch.cat([first, m(x[:, 4:], state, offset=4)], 1), m(x))
    assert not torch.allclose(m(x[:, 4:], state), m(x)[:, 4:], rtol=1e-2)
    packed = torch.cat([x[:1, :3], x[1:, 3:]], 1)
    offsets = torch.tensor([0, 3, L], dtype=torch.int32)
    torch.testing.assert_close(m(packed, cu_seqlens=offsets), torch.cat([m(x[:1, :3]), m(x[1:, 3:])], 1))
    parts = []
    state, before = None, torch.zeros(2, dtype=torch.int64)
    for lengths in ((2, 4), (1, L - 7)):  # of both sequences, which go on where they were
        pack = torch.cat(
            [x[i : i + 1, b : b + n] for i, (b, n) in enumerate(zip(before.tolist(), lengths, strict=True))], 1
        )
        offsets = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        y, state = m(pack, state, offsets, before, return_state=True)
        parts.append(y.split(lengths, 1))
        before = before + torch.tensor(lengths)
    for i in range(2):
        whole = torch.cat([p[i] for p in parts], 1)
        torch.testing.assert_close(whole, m(x[i : i + 1, : whole.shape[1]]))


def vir(m, x, form=retained):
    if m.class_token == "first":
        x = torch.cat([x[:, 1:], x[:, :1]], 1)
    h, d = m.num_heads, x.shape[-1] // m.num_heads
    q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, h, d).permute(2, 0, 3, 1, 4)
    gamma = gammas(m, wide(x).dtype)
    if m.decay == "published":
        gamma = 1 - torch.tensor([(1 / 32) * (32 / 512) ** (i / (h - 1)) for i in range(h)], dtype=gamma.dtype)
    y = form(*map(wide, (q, k, v)), gamma, m.bidirectional) * d**-0.5
    y = m.out_proj(y.to(x.dtype).transpose(1, 2).flatten(2))
    return torch.cat([y[:, -1:], y[:, :-1]], 1) if m.class_token == "first" else y


VIR = {"published": {}, "powers, class token first": {"decay": "powers", "class_token": "first"}, "both directions": {
    "bidirectional": True}}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VIR.values(), ids=VIR.keys())
def test_vir_like_the_formula(kwargs, dtype):
    m = randomise(ViRRetention(24, 3, **kwargs)).to(dtype)
    check(m, vir, tokens(2, L, 24, dtype=dtype), also=[functools.partial(vir, form=form) for form in FORMS])


def test_vir_class_token_sees_the_image_and_none_sees_it():
    x = tokens(2, L, 24)
    for place, of_class, others in (("first", 0, slice(1, None)), ("last", -1, slice(0, -1))):
        m = randomise(ViRRetention(24, 3, class_token=place), scale=0.2)
        changed = x.clone()
        changed[:, of_class] += 1
        torch.testing.assert_close(m(changed)[:, others], m(x)[:, others])
        changed = x.clone()
        changed[:, 1 if place == "first" else 0] += 1
        assert not torch.allclose(m(changed)[:, of_class], m(x)[:, of_class], rtol=1e-2)
    first, state = m(x[:, :4], return_state=True)
    torch.testing.assert_close(torch.cat([first, m(x[:, 4:], state)], 1), m(x))


def test_parameter_names():
    names = {f"{n}_proj.weight" for n in "qkvgo"} | {"g_norm_swish_gate.weight"}
    assert set(MultiScaleRetention(**SIZES).state_dict()) == names
    assert set(ViRRetention(24, 3).state_dict()) == {
        f"{n}.{p}" for n in ("qkv", "out_proj") for p in ("weight", "bias")
    }


def test_bad_arguments():
    for make, message in (
        (lambda: MultiScaleRetention(**SIZES, rotary="x"), "MultiScaleRetention: rotary must be None or one of .*'x'"),
        (lambda: MultiScaleRetention("chunk", 24), "MultiScaleRetention: expand_k must be such that key dims are even"),
        (lambda: ViRRetention(24, 5), "ViRRetention: dim must be a multiple of num_heads 5, got 24"),
        (lambda: ViRRetention(24, 3, decay="x"), "ViRRetention: decay must be one of .*, got 'x'"),
        (lambda: ViRRetention(24, 3, class_token=None), "ViRRetention: class_token must be one of .*, got None"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("make", [
    lambda **factory: MultiScaleRetention(**SIZES, **factory),
    lambda **factory: ViRRetention(24, 3, class_token="first", **factory),
], ids=["RetNet", "ViR"])  # fmt: skip
def test_the_rest(make):
    check_everything_else(randomise(make(), scale=0.2), make, tokens(2, L, 24))
