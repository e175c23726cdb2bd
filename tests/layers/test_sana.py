"""effvit.layers.LiteLA and SanaLinearAttention against the paper's formula."""

import pytest
import torch
from layer_suite import DTYPES, attend, check_everything_else, check_forms, randomise, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import LiteLA, SanaLinearAttention


def relu_attention(q, k, v, heads, form):
    """[B, L, C], [B, M, C], [B, M, C] -> [B, L, C]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attend(q.relu(), k.relu(), v, lambda s: s + 1e-15, form=form).transpose(1, 2).flatten(2)


def rms_norm(x, module, eps):
    if module is None or isinstance(module, torch.nn.Identity):
        return x
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight


def plain_lite(m, x, form="pairs"):
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    q, k = rms_norm(q, m.q_norm, 1e-5), rms_norm(k, m.k_norm, 1e-5)
    return m.proj(relu_attention(q, k, v, m.in_dim // m.dim, form))


def plain_diffusers(m, x, context=None, form="pairs"):
    context = x if context is None else context
    q, k = rms_norm(m.to_q(x), m.norm_q, 1e-5), rms_norm(m.to_k(context), m.norm_k, 1e-5)
    return m.to_out[0](relu_attention(q, k, m.to_v(context), m.heads, form))


def check_lite(m, x, **kwargs):
    return check_forms(m, plain_lite, x, **kwargs)


def check_diffusers(m, x, **kwargs):
    return check_forms(m, plain_diffusers, x, **kwargs)


LITE = {
    "plain": {},
    "qk_norm, bias": {"qk_norm": True, "use_bias": True},
    "heads": {"heads": 2},
    "heads_ratio": {"heads_ratio": 0.5},
}
DIFFUSERS = {
    "plain": {},
    "qk_norm, bias": {"qk_norm": "rms_norm_across_heads", "bias": True, "out_bias": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", LITE.values(), ids=LITE.keys())
def test_lite_la(kwargs, dtype):
    m = randomise(LiteLA(24, 24, **{"dim": 6, **kwargs})).to(dtype)
    check_lite(m, tokens(3, 35, 24, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", DIFFUSERS.values(), ids=DIFFUSERS.keys())
def test_diffusers(kwargs, dtype):
    m = randomise(SanaLinearAttention(20, heads=3, dim_head=8, **kwargs)).to(dtype)
    check_diffusers(m, tokens(3, 35, 20, dtype=dtype))


@pytest.mark.parametrize("length", [4, 30], ids=["quadratic form", "linear form"])
def test_cross_attention(length):
    m = randomise(SanaLinearAttention(20, cross_attention_dim=12, heads=3, dim_head=8))
    context = tokens(3, length, 12, seed=2)

    def reorder(x):  # check() also runs the batch in reverse
        flipped = torch.equal(x.float(), tokens(3, 17, 20).flip(0))
        return (context.flip(0) if flipped else context).to(x.dtype)

    plain = lambda m, x, form="pairs": plain_diffusers(m, x, reorder(x), form)
    check_forms(m, plain, tokens(3, 17, 20), call=lambda m, x: m(x, reorder(x)))


@pytest.mark.parametrize("length", [5, 40], ids=["quadratic form", "linear form"])
def test_autocast(length):
    check_lite(randomise(LiteLA(24, 24, dim=8, qk_norm=True)), tokens(2, length, 24), autocast=torch.bfloat16)
    m = randomise(SanaLinearAttention(24, heads=3, dim_head=8, qk_norm="rms_norm_across_heads"))
    check_diffusers(m, tokens(2, length, 24), autocast=torch.bfloat16)


def test_parameter_names_are_the_originals():
    lite = {"qkv.weight", "proj.weight", "proj.bias"}
    assert set(LiteLA(24, 24, dim=8).state_dict()) == lite
    assert set(LiteLA(24, 24, dim=8, qk_norm=True).state_dict()) == lite | {"q_norm.weight", "k_norm.weight"}
    diffusers = {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}
    assert set(SanaLinearAttention(24).state_dict()) == diffusers
    normed = SanaLinearAttention(24, qk_norm="rms_norm_across_heads")
    assert set(normed.state_dict()) == diffusers | {"norm_q.weight", "norm_k.weight"}


def test_queries_without_a_positive_feature_attend_to_nothing():
    m = randomise(LiteLA(24, 24, dim=8))
    y = m(torch.cat([tokens(1, 20, 24), torch.zeros(1, 1, 24)], dim=1))
    assert_bitwise_equal(y[0, 20], m.proj.bias)


def test_float16_overflow_becomes_the_largest_float16():
    m = LiteLA(8, 8, dim=8).half()
    with torch.no_grad():
        m.qkv.weight.copy_(torch.eye(8).repeat(3, 1))
        m.proj.weight.copy_(torch.eye(8) * 60000)
        m.proj.bias.zero_()
    assert m(torch.full((1, 16, 8), 4.0).half()).unique().tolist() == [65504.0]


def test_float16_does_not_overflow_inside():
    """The sums over keys exceed float16; their ratio does not."""
    m = LiteLA(8, 8, dim=8).half()
    with torch.no_grad():
        m.qkv.weight.copy_(torch.eye(8).repeat(3, 1))
        m.proj.weight.copy_(torch.eye(8))
        m.proj.bias.zero_()
    x = torch.full((1, 4096, 8), 100.0).half()
    torch.testing.assert_close(m(x), x)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"LiteLA: in_dim must be a multiple of the head dim 8, got 20"):
        LiteLA(20, 24, dim=8)
    with pytest.raises(ValueError, match=r"qk_norm must be None or 'rms_norm_across_heads', got 'layer_norm'"):
        SanaLinearAttention(24, qk_norm="layer_norm")


@pytest.mark.parametrize("make", [
    lambda **factory: LiteLA(24, 24, dim=8, qk_norm=True, **factory),
    lambda **factory: SanaLinearAttention(24, heads=3, dim_head=8, qk_norm="rms_norm_across_heads", **factory),
], ids=["LiteLA", "SanaLinearAttention"])  # fmt: skip
def test_the_rest(make):
    check_everything_else(randomise(make()), make, tokens(2, 35, 24))


@pytest.mark.parametrize("autocast", [False, True])
def test_heads_wider_than_the_operators_take_sum_in_float32(autocast):
    m, x = randomise(LiteLA(320, 320, heads=1)).eval(), tokens(1, 4096, 320)
    truth = plain_lite(m.double(), x.double(), form="state")
    m = m.float() if autocast else m.half()
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        y = m(x if autocast else x.half())
    assert y.dtype == torch.float16 and y.isfinite().all()
    assert (y - truth).norm() < 2e-3 * truth.norm()


def test_no_heads():
    with pytest.raises(ValueError, match="effvit::LiteLA: heads must be >= 1, got 0"):
        LiteLA(24, 24)
