"""effvit.layers.TCNCA against its formula: attention over all tokens, masked to chunks."""

import pytest
import torch
from gated_formulas import convolved, silu
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import TCNCA

L, DIM = 11, 12
SIZES = {"embed_dim": DIM, "zdim": 6, "hdim": 10, "depth": 3}


def plain(m, x):
    y = m.norm(x) if m.prenorm else x
    mixed = y
    for conv in m.move.convs:
        mixed = mixed + silu(convolved(conv, mixed, not m.bidirectional))
    u, z, r, h = m.mx_proj(mixed).split([m.embed_dim, m.zdim, m.hdim, m.embed_dim], dim=-1)
    shape = (*x.shape[:2], 2, m.zdim)
    q, k = (silu(z)[:, :, None] * spread(m, "gamma", shape) + spread(m, "beta", shape)).unbind(2)
    n = torch.arange(x.shape[1])
    chunk = n if m.chunk_size < 0 else n // m.chunk_size
    seen = torch.ones(len(n), len(n)).bool() if m.chunk_size < 0 else chunk[:, None] == chunk
    seen = seen if m.bidirectional else seen & (n <= n[:, None])
    bias = spread(m.rel_pos_bias, "rel_pos_bias", (len(x), m.rel_pos_bias.rel_pos_bias.shape[0]))
    difference = (n - n[:, None]).clamp(-m.rel_pos_bias.max_positions + 1, m.rel_pos_bias.max_positions - 1)
    scores = q @ k.mT * m.zdim**-0.5 + bias[:, difference + m.rel_pos_bias.max_positions - 1]
    a = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ silu(m.v_proj(y)).to(q.dtype)
    h = silu(h + m.h_proj(a * silu(r)))
    out = x + u.sigmoid() * (h - x)
    return out if m.prenorm else m.norm(out)


VARIANTS = {
    "chunks": {"chunk_size": 4},
    "all tokens": {"max_positions": 16},
    "both directions, norm last": {"bidirectional": True, "chunk_size": 4, "prenorm": False, "dilation": 3},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, dtype):
    check(randomise(TCNCA(**SIZES, **kwargs)).to(dtype), plain, tokens(2, L, DIM, dtype=dtype))


def test_what_a_token_sees():
    """Its chunk up to itself, and as many tokens before as the convolutions reach: 1 + 2 (2^3 - 1) with 3 layers."""
    m, x = randomise(TCNCA(**SIZES, chunk_size=4)).eval(), tokens(1, 24, DIM)
    for token in (0, 5, 12):
        changed = x.clone()
        changed[:, token] *= -1  # a constant would not pass the norm
        differs = (m(changed) - m(x)).abs().amax(-1)[0] > 0
        assert not differs[:token].any() and differs[token]
        # a key in the last chunk that the convolutions reach is seen by the rest of its chunk
        last = (token + 14) // 4 * 4 + 3
        assert not differs[last + 1 :].any()
        assert differs[token : min(token + 15, 24)].all()


def test_a_length_beyond_the_bias_is_refused():
    with pytest.raises(ValueError, match="effvit::TCNCA: x must have at most max_positions 8 tokens, got 11"):
        TCNCA(**SIZES, max_positions=8)(tokens(1, L, DIM))
    for kwargs, message in (
        ({"chunk_size": 0}, "chunk_size must be >= 1, or negative for none, got 0"),
        ({"bidirectional": True, "kernel_size": 4}, "kernel_size must be odd with bidirectional, got 4"),
        ({"dilation": 0}, "dilation must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"effvit::TCNCA: {message}"):
            TCNCA(**SIZES, **kwargs)


def test_dropout_is_active_in_training_only():
    x = tokens(2, L, DIM)
    for name in ("dropout", "attention_dropout", "hidden_dropout"):
        m = randomise(TCNCA(**SIZES, chunk_size=4, **{name: 0.5}))
        assert not torch.equal(m(x), m(x)), name
        assert_bitwise_equal(m.eval()(x), m(x))


def test_parameter_names_are_megas():
    names = {f"{n}.{p}" for n in ("norm", "v_proj", "mx_proj", "h_proj") for p in ("weight", "bias")}
    names |= {f"move.convs.{i}.{p}" for i in range(3) for p in ("weight", "bias")}
    m = TCNCA(**SIZES, chunk_size=4)
    assert set(m.state_dict()) == names | {"gamma", "beta", "rel_pos_bias.rel_pos_bias"}
    assert m.rel_pos_bias.rel_pos_bias.shape == (7,) and m.mx_proj.weight.shape == (6 + 10 + 24, DIM)
    assert [c.dilation[0] for c in m.move.convs] == [1, 2, 4]


def test_the_rest():
    make = lambda **factory: TCNCA(**SIZES, chunk_size=4, **factory)
    check_everything_else(randomise(make()), make, tokens(2, L, DIM))


def test_dilations_beyond_the_operators():
    """Taps that far away meet zeros alone: those of 65536 are the convolution with the last tap."""
    m, x = TCNCA(**SIZES | {"depth": 17}), tokens(1, L, DIM)
    torch.testing.assert_close(m(x), plain(m, x))
