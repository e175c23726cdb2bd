"""effvit.layers.HyenaOperator against its recurrence with Toeplitz matrices and with torch.fft."""

import functools
import math

import pytest
import torch
from fft_formulas import fourier, implicit_taps, positions, toeplitz
from gated_formulas import convolved
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import HyenaOperator

L, DIM = 11, 6


def plain(m, x, convolve=toeplitz):
    f, filters = m.filter_fn, m.order - 1
    w = convolved(m.short_filter, m.in_proj(x))
    *x, v = w.split(DIM, dim=-1)
    taps = min(w.shape[1], m.l_max)
    k = implicit_taps(f, taps)
    back = implicit_taps(f, taps, "implicit_filter_rev") if m.bidirectional else None
    bias = spread(f, "bias", (*v.shape[:2], DIM * filters))
    for i in range(filters):  # channel c of filter i is channel c * filters + i of the MLP
        d = bias[..., i::filters] if f.use_bias else None
        v = convolve(v * x[filters - i], k[i::filters], d, None if back is None else back[i::filters])
    return m.out_proj(m.activation(v * x[0]))


VARIANTS = {
    "order 2": {"order": 2},
    "order 4, a wide MLP": {"order": 4, "emb_dim": 5, "filter_order": 7, "num_inner_mlps": 1, "shift": 0.1},
    "fewer taps than tokens": {"l_max": 4, "order": 3},
    "more taps than tokens": {"l_max": 16, "short_filter_order": 4},
    "both directions": {"bidirectional": True, "order": 3},
    "normalised, without windows and biases": {"normalized": True, "modulate": False, "bias": False},
    "gelu": {"activation": "gelu"},
}


def layer(**kwargs):
    return HyenaOperator(DIM, **{"l_max": L, "filter_order": 8, **kwargs})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, dtype):
    m = randomise(layer(**kwargs)).to(dtype)
    check(m, plain, tokens(2, L, DIM, dtype=dtype), also=[functools.partial(plain, convolve=fourier)])


def test_autocast():
    m = randomise(layer(order=3))
    check(m, plain, tokens(2, L, DIM), also=[functools.partial(plain, convolve=fourier)], autocast=torch.bfloat16)


def test_filters_are_not_computed_in_bfloat16():
    """Under autocast too: of 300 positions half would coincide."""
    f = randomise(layer(l_max=300)).filter_fn
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_bitwise_equal(f.filter(300), f.filter(300).float())
        under_autocast = f.filter(300)
    assert_bitwise_equal(under_autocast, f.filter(300))


def test_what_a_token_sees():
    x = tokens(1, L, DIM)
    changed = x.clone()
    changed[:, 5] *= -1
    for kwargs, first, last in (({}, 5, L), ({"l_max": 3}, 5, 10), ({"bidirectional": True}, 0, L)):
        m = randomise(layer(**kwargs)).eval()
        differs = (m(changed) - m(x)).abs().amax(-1)[0] > 1e-6
        assert differs[first:last].all() and not differs[:first].any() and not differs[last:].any(), kwargs


def test_initial_positions_and_windows():
    m = HyenaOperator(DIM, 20, order=3, emb_dim=7)
    z, t, deltas = m.filter_fn.pos_emb.z, m.filter_fn.pos_emb.t, m.filter_fn.modulation.deltas
    torch.testing.assert_close(z[0].double(), positions(20, 7), rtol=1e-6, atol=1e-6)  # stored as float32
    torch.testing.assert_close(t[0, :, 0].double(), positions(20, 7)[:, 0], rtol=1e-6, atol=1e-6)
    assert deltas.shape == (1, 1, 2 * DIM)
    for end, percent in ((0, 1.5), (-1, 0.3)):  # the window is 0.01 at that part of the filter
        assert math.isclose(math.exp(-percent * abs(float(deltas[0, 0, end]))), 0.01, rel_tol=1e-5)


def test_keys():
    """Those of the original's state_dict."""
    names = {f"{n}.{p}" for n in ("in_proj", "out_proj", "short_filter") for p in ("weight", "bias")}
    names |= {f"filter_fn.{n}" for n in ("bias", "pos_emb.z", "pos_emb.t", "modulation.deltas")}
    mlp = {f"filter_fn.implicit_filter.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")}
    mlp |= {f"filter_fn.implicit_filter.{i}.freq" for i in (1, 3, 5)} | {"filter_fn.implicit_filter.6.weight"}
    m = HyenaOperator(DIM, L, order=3)
    assert set(m.state_dict()) == names | mlp
    assert m.filter_fn.implicit_filter[6].weight.shape == (2 * DIM, 64)
    assert m.short_filter.weight.shape == (4 * DIM, 1, 3)
    parameters = dict(m.named_parameters())
    assert "filter_fn.pos_emb.z" in parameters and "filter_fn.pos_emb.t" not in parameters
    fixed = dict(HyenaOperator(DIM, L, lr_pos_emb=0.0, modulation_lr=0.1).named_parameters())
    assert "filter_fn.pos_emb.z" not in fixed and "filter_fn.modulation.deltas" in fixed


def test_bad_arguments():
    for kwargs, message in (
        ({"order": 1}, "HyenaOperator: order must be >= 2, got 1"),
        ({"l_max": 0}, "HyenaOperator: l_max must be >= 1, got 0"),
        ({"activation": "softplus"}, "HyenaOperator: activation must be one of .*, got 'softplus'"),
        ({"emb_dim": 4}, "HyenaFilter: emb_dim must be odd and at least 3 .*, got 4"),
        ({"emb_dim": 1}, "HyenaFilter: emb_dim must be odd and at least 3 .*, got 1"),
    ):
        with pytest.raises(ValueError, match=f"effvit::{message}"):
            layer(**kwargs)


def test_dropout_is_active_in_training_only():
    m, x = randomise(layer(dropout=0.5)), tokens(2, L, DIM)
    assert not torch.equal(m(x), m(x))
    assert_bitwise_equal(m.eval()(x), randomise(layer()).eval()(x))


def test_the_rest():
    make = lambda **factory: layer(order=3, **factory)
    check_everything_else(randomise(make()), make, tokens(2, L, DIM))


def test_no_tokens():
    y = HyenaOperator(DIM, 8)(torch.zeros((2, 0, DIM)))
    assert y.shape == (2, 0, DIM)
    y.sum().backward()
