"""effvit.layers.Mamba2 against the formula of state space duality: token after token, and all pairs."""

import functools

import pytest
import torch
from gated_formulas import attend, convolved, pairs, recurrence, silu, wide
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import Mamba2

SIZES = {"d_model": 24, "headdim": 12, "d_state": 10}  # 4 heads
L = 9


def plain(m, u, scan=recurrence, cast=lambda t: t):
    """`cast` takes what the norm and its gate are computed of: as it is, or in float32."""
    d_mlp, n = m.d_inner - m.d_ssm, m.ngroups * m.d_state
    z0, x0, z, xBC, dt = m.in_proj(u).split([d_mlp, d_mlp, m.d_ssm, m.d_ssm + 2 * n, m.nheads], dim=-1)
    x, B, C = silu(convolved(m.conv1d, xBC, not m.bidirectional)).split([m.d_ssm, n, n], dim=-1)
    x = x.unflatten(-1, (m.nheads, -1))
    groups = torch.arange(m.nheads) // (m.nheads // m.ngroups)
    B, C = (t.unflatten(-1, (m.ngroups, -1))[:, :, groups] for t in (B, C))
    dt = torch.log1p((wide(dt) + wide(spread(m, "dt_bias", dt.shape))).exp()).clamp(*m.dt_limit)
    g = -wide(spread(m, "A_log", dt.shape)).exp() * dt
    inputs = (C, B, (x * dt[..., None]).to(x.dtype), g[..., None])
    y = attend(scan, *(wide(t).transpose(1, 2) for t in inputs), m.bidirectional).transpose(1, 2).to(x.dtype)
    D = spread(m, "D", (*x.shape[:2], m.D.shape[0])).unflatten(-1, (m.nheads, -1))
    y, z = cast((y + D * x).flatten(2)), cast(z)
    if m.norm is None:
        y = y * silu(z)
    else:
        y = y if m.norm.norm_before_gate else y * silu(z)
        y = y.unflatten(-1, (m.ngroups, -1))
        y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2)
        y = y * cast(spread(m.norm, "weight", y.shape))
        y = y * silu(z) if m.norm.norm_before_gate else y
    return m.out_proj(torch.cat([silu(z0) * x0, y.to(x0.dtype)], -1) if d_mlp else y.to(x.dtype))


def make_random(**kwargs):
    """D around 1, as initialised: the norm blows rounding errors of small numbers up."""
    m = randomise(Mamba2(**SIZES, **kwargs))
    with torch.no_grad():
        m.D.add_(1)
    return m


VARIANTS = {
    "default": {},
    "two groups, limits of dt": {"ngroups": 2, "dt_limit": (0.5, 1.5)},
    "a group per head, norm before gate": {"ngroups": 4, "norm_before_gate": True},
    "part of the channels, D per channel": {"d_ssm": 24, "D_has_hdim": True, "bias": True},
    "no norm": {"rmsnorm": False, "conv_bias": False},
    "both directions": {"bidirectional": True, "d_conv": 3},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, dtype):
    m = make_random(**kwargs).to(dtype)
    check(
        m,
        plain,
        tokens(2, L, 24, dtype=dtype),
        also=[functools.partial(plain, scan=s, cast=wide) for s in (recurrence, pairs)],
    )


def test_autocast():
    check(make_random(), plain, tokens(2, L, 24), autocast=torch.bfloat16)


def test_state_and_flat_tokens():
    """Without a convolution over tokens, parts of a sequence give what the whole does."""
    u = tokens(2, L, 24)
    for ngroups in (1, 2):
        m = randomise(Mamba2(**SIZES, d_conv=1, ngroups=ngroups))
        first, state = m(u[:, :4], return_state=True)
        assert state.shape == (2, 4, 10, 12) and state.dtype == torch.float32
        torch.testing.assert_close(torch.cat([first, m(u[:, 4:], initial_state=state)], 1), m(u))
    torch.testing.assert_close(m(u.flatten(0, 1), seqlen=L), m(u).flatten(0, 1))


def test_no_token_sees_a_later_one():
    m, u = randomise(Mamba2(**SIZES)), tokens(1, L, 24)
    changed = u.clone()
    changed[:, 6:] += 1
    assert_bitwise_equal(m(changed)[:, :6], m(u)[:, :6])
    assert not torch.equal(m(changed)[:, 6:], m(u)[:, 6:])


def test_parameters_and_initialisation():
    torch.manual_seed(0)
    m = Mamba2(512, headdim=1, d_state=4, dt_min=0.01, dt_max=0.2, A_init_range=(2, 8), conv_init=0.3)
    names = {
        "in_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "dt_bias",
        "A_log",
        "D",
        "norm.weight",
        "out_proj.weight",
    }
    assert set(m.state_dict()) == names
    assert m.in_proj.weight.shape == (2 * 1024 + 8 + 1024, 512) and m.conv1d.weight.shape == (1024 + 8, 1, 4)
    dt, a = torch.nn.functional.softplus(m.dt_bias), m.A_log.exp()
    assert 0.0099 < dt.min() < 0.011 and 0.19 < dt.max() < 0.201
    assert 2 <= a.min() < 2.1 and 7.9 < a.max() <= 8.001
    assert 0.29 < m.conv1d.weight.abs().max() <= 0.3
    assert all(p._no_weight_decay for p in (m.A_log, m.D, m.dt_bias))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"headdim": 7}, "headdim must be a divisor of 48 channels, got 7"),
        ({"ngroups": 3}, "ngroups must be a divisor of the 4 heads, got 3"),
        ({"d_ssm": 60}, "d_ssm must be between 1 and expand .* = 48, got 60"),
        ({"bidirectional": True}, "d_conv must be odd with bidirectional, got 4"),
        ({"process_group": object()}, "process_group must be None, got <object"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=f"effvit::Mamba2: {message}"):
        Mamba2(**(SIZES | kwargs))
    with pytest.raises(ValueError, match="effvit::Mamba2: seq_idx must be None, got Tensor"):
        Mamba2(**SIZES)(tokens(1, L, 24), seq_idx=torch.zeros(1, L))


def test_the_rest():
    make = lambda **factory: Mamba2(**SIZES, ngroups=2, **factory)
    check_everything_else(randomise(make()), make, tokens(2, L, 24))
