"""effvit.layers.GatedLinearAttention against GLA's formula: token after token, and all pairs."""

import functools

import pytest
import torch
from gated_formulas import attend, convolved, pairs, recurrence, silu, wide
from layer_suite import DTYPES, check, check_everything_else, randomise, tokens

from effvit.layers import GatedLinearAttention

SIZES = {"hidden_size": 24, "num_heads": 3, "gate_low_rank_dim": 5}
L = 9


def plain(m, x, scan=recurrence):
    q, k, v = m.q_proj(x), m.k_proj(x), m.v_proj(x)
    if m.use_short_conv:
        q, k, v = (silu(convolved(c, t)) for c, t in ((m.q_conv1d, q), (m.k_conv1d, k), (m.v_conv1d, v)))
    if m.feature_map == "relu":
        q, k = q.clamp(min=0), k.clamp(min=0)
    g = -torch.log1p((-wide(m.gk_proj(x))).exp()) / m.gate_logit_normalizer
    if m.clamp_min is not None:
        g = g.clamp(min=m.clamp_min)
    K, V = m.key_dim // m.num_heads, m.value_dim // m.num_heads
    q, k, g = (t.unflatten(-1, (-1, K)).transpose(1, 2) for t in (q, k, g))
    v = v.unflatten(-1, (-1, V)).transpose(1, 2)
    repeats = m.num_heads // m.num_kv_heads
    k, v, g = (t.repeat_interleave(repeats, dim=1) for t in (k, v, g))
    y = attend(scan, *map(wide, (q, k, v)), g, m.bidirectional) * K**-0.5
    norm = m.g_norm_swish_gate if hasattr(m, "g_norm_swish_gate") else m.g_norm
    y = norm(y.to(x.dtype).transpose(1, 2)).flatten(2)
    if m.use_output_gate:
        gate = m.g_proj(x)
        y = y * (gate.sigmoid() if m.gate == "sigmoid" else silu(gate))
    return m.o_proj(y)


VARIANTS = {
    "default": {},
    "short convolutions, feature map": {"use_short_conv": True, "conv_bias": True, "feature_map": "relu"},
    "shared keys and values, clamped gates": {"num_kv_heads": 1, "clamp_min": -0.05, "expand_k": 1.0},
    "no output gate": {"use_output_gate": False, "elementwise_affine": False, "gate_logit_normalizer": 1},
    "both directions": {"bidirectional": True, "fuse_norm": False, "gate_fn": "sigmoid"},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, dtype):
    m = randomise(GatedLinearAttention(**SIZES, **kwargs)).to(dtype)
    check(m, plain, tokens(2, L, 24, dtype=dtype), also=[functools.partial(plain, scan=pairs)])


def test_autocast():
    m = randomise(GatedLinearAttention(**SIZES))
    check(m, plain, tokens(2, L, 24), autocast=torch.bfloat16, also=[functools.partial(plain, scan=pairs)])


def test_in_parts():
    """A sequence in parts, each starting from the state of the one before; several in one batch."""
    m, x = randomise(GatedLinearAttention(**SIZES)), tokens(2, L, 24)
    first, state = m(x[:, :4], return_state=True)
    assert state.shape == (2, 3, 4, 8) and state.dtype == torch.float32
    torch.testing.assert_close(torch.cat([first, m(x[:, 4:], state)], 1), m(x))
    packed = torch.cat([x[:1, :3], x[1:, 3:]], 1)
    offsets = torch.tensor([0, 3, L], dtype=torch.int32)
    torch.testing.assert_close(m(packed, cu_seqlens=offsets), torch.cat([m(x[:1, :3]), m(x[1:, 3:])], 1))


def test_parameter_names_are_flas():
    names = {f"{n}_proj.weight" for n in "qkvgo"} | {"gk_proj.0.weight", "gk_proj.1.weight", "gk_proj.1.bias"}
    assert set(GatedLinearAttention(**SIZES).state_dict()) == names | {"g_norm_swish_gate.weight"}
    assert set(GatedLinearAttention(**SIZES, fuse_norm=False).state_dict()) == names | {"g_norm.weight"}
    m = GatedLinearAttention(**SIZES, use_output_gate=False, use_short_conv=True)
    convs = {f"{n}_conv1d.weight" for n in "qkv"}
    assert set(m.state_dict()) == (names - {"g_proj.weight"}) | {"g_norm.weight"} | convs


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_heads": 5}, "expand_k must be such that the keys are a multiple of 5 heads, got 0.5"),
        ({"expand_v": 1 / 24}, "expand_v must be such that the values are a multiple of 3 heads"),
        ({"num_kv_heads": 2}, "num_kv_heads must be a divisor of 3, got 2"),
        ({"feature_map": "elu"}, "feature_map must be None or one of .*, got 'elu'"),
        ({"gate_fn": "tanh"}, "gate_fn must be one of .*, got 'tanh'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=f"effvit::GatedLinearAttention: {message}"):
        GatedLinearAttention(**(SIZES | kwargs))


def test_bad_calls():
    x = tokens(1, L, 24)
    with pytest.raises(ValueError, match="cu_seqlens must be None with use_short_conv"):
        m = GatedLinearAttention(**SIZES, use_short_conv=True)
        m(x, cu_seqlens=torch.tensor([0, L], dtype=torch.int32))
    with pytest.raises(ValueError, match="return_state must be False when bidirectional is True"):
        GatedLinearAttention(**SIZES, bidirectional=True)(x, return_state=True)


def test_the_rest():
    make = lambda **factory: GatedLinearAttention(**SIZES, use_short_conv=True, **factory)
    check_everything_else(randomise(make()), make, tokens(2, L, 24))
