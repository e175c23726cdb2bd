"""effvit.layers.GatedJointAttention against MossFormer's formula: all token pairs, and token after token."""

import functools

import pytest
import torch
import torch.nn.functional as F
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import GatedJointAttention
from effvit.layers.mossformer import rotate

L, DIM = 19, 12
SIZES = {"dim": DIM, "group_size": 7, "query_key_dim": 10, "expansion_factor": 3.0, "kernel_size": 5}


def turned(x, dims):
    """Pairs of channels as complex numbers, turned by position times 10000^(-2i / dims)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    angle = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(0, dims, 2).double() / dims)
    pairs = torch.view_as_complex(wide[..., :dims].unflatten(-1, (-1, 2)).contiguous())
    pairs = pairs * torch.polar(torch.ones_like(angle), angle).to(pairs.dtype)
    return torch.cat((torch.view_as_real(pairs).flatten(-2), wide[..., dims:]), -1).to(x.dtype)


def project(m, x, causal):
    """Norm, linear, SiLU, and the sum over taps of the convolution."""
    x = F.silu(m.linear(m.norm(x)))
    taps = m.conv.weight.shape[-1]
    before = taps - 1 if causal else taps // 2
    padded = F.pad(x, (0, 0, before, taps - 1 - before))
    return x + sum(padded[:, i : i + x.shape[1]] * m.conv.weight[:, 0, i] for i in range(taps))


def formula(m, x, form="pairs"):
    B, n = x.shape[:2]
    y = x
    if m.shift_tokens:
        half = x.shape[2] // 2
        before = torch.cat((torch.zeros_like(x[:, :1, :half]), x[:, :-1, :half]), 1)
        y = torch.cat((before, x[..., half:]), -1)
    hidden, z = project(m.to_hidden, y, m.causal), project(m.to_qk, y, m.causal)
    v, u = hidden.chunk(2, -1)
    gamma, beta = (spread(m, p, (B, n, *getattr(m, p).shape)) for p in ("gamma", "beta"))
    q1, q2, k1, k2 = ((turned(z * gamma[:, :, i] + beta[:, :, i], m.rotary_dim)) for i in range(4))
    g = m.group_size
    index = torch.arange(n)
    own, other = index[:, None] // g, index // g
    near = own == other
    far = torch.ones(n, n, dtype=torch.bool)
    if m.causal:
        near, far = near.tril(), other < own
    local = F.relu(q1 @ k1.mT / g) ** 2 * near
    if form == "pairs":
        attended = (local + q2 @ k2.mT / (g if m.causal else n) * far) @ hidden
    else:  # from states, for not causal ones
        attended = local @ hidden + q2 / n @ (k2.mT @ hidden)
    attended_v, attended_u = attended.chunk(2, -1)
    return x + project(m.to_out, (attended_u * v) * torch.sigmoid(attended_v * u), m.causal)


VARIANTS = {
    "as published": {},
    "one group, no shift": {"group_size": 32, "shift_tokens": False, "rotary_dim": 4},
    "causal": {"causal": True},
    "causal, small groups": {"causal": True, "group_size": 3, "kernel_size": 4},
    "wide values": {"expansion_factor": 44.0, "query_key_dim": 6},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, dtype):
    m = randomise(GatedJointAttention(**{**SIZES, **kwargs})).to(dtype)
    also = [] if m.causal else [functools.partial(formula, form="state")]
    check(m, formula, tokens(2, L, DIM, dtype=dtype), also=also)


def test_autocast():
    m = randomise(GatedJointAttention(**SIZES)).eval()
    also = [functools.partial(formula, form="state")]
    check(m, formula, tokens(2, L, DIM), autocast=torch.bfloat16, also=also)


def test_causal_sees_no_later_token():
    m = randomise(GatedJointAttention(**SIZES, causal=True)).eval()
    x = tokens(1, L, DIM)
    y = x.clone()
    y[:, 11:] += 1
    assert_bitwise_equal(m(x)[:, :11], m(y)[:, :11])
    assert not torch.equal(m(x)[:, 11:], m(y)[:, 11:])


def test_rotations_keep_lengths_and_know_offsets_only():
    q, k = tokens(1, L, 6).double(), tokens(1, L, 6, seed=2).double()
    torch.testing.assert_close(rotate(q, 4).square().sum(-1), q.square().sum(-1))
    torch.testing.assert_close(rotate(q, 4), turned(q, 4))
    same = rotate(q[:, :1].expand(-1, L, -1), 4) @ rotate(k[:, :1].expand(-1, L, -1), 4).mT
    torch.testing.assert_close(same[0, 5, 2], same[0, 13, 10])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"dim": 11}, "dim must be even with shift_tokens, got 11"),
        ({"expansion_factor": 0.1}, "expansion_factor must be such that dim times it is even"),
        ({"group_size": 0}, "group_size must be >= 1, got 0"),
        ({"query_key_dim": 300}, "query_key_dim must be between 1 and 256, got 300"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=f"effvit::GatedJointAttention: {message}"):
        GatedJointAttention(**{**SIZES, **kwargs})


@pytest.mark.parametrize("causal", [False, True])
def test_the_rest(causal):
    make = lambda **factory: GatedJointAttention(**SIZES, causal=causal, **factory)
    check_everything_else(randomise(make()), make, tokens(2, L, DIM))


def test_dropout():
    m = randomise(GatedJointAttention(**SIZES, dropout=1.0))
    x = tokens(2, L, DIM)
    assert_bitwise_equal(m(x), x)
