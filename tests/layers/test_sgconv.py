"""effvit.layers.SGConv against its formula: stretched kernels by hand, convolutions by Toeplitz matrices."""

import functools

import pytest
import torch
from fft_formulas import fourier, toeplitz, wide
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import SGConv

L, DIM = 13, 6


def stretched(w, times, nearest):
    """[.., n] -> [.., n times]: output o lies at (o + 1/2) / times - 1/2 of the input."""
    n = w.shape[-1]
    o = torch.arange(n * times, dtype=torch.float64)
    if nearest:
        return w[..., (o / times).long()]
    at = ((o + 0.5) / times - 0.5).clamp(min=0)
    low = at.long()
    part = (at - low).to(w.dtype)
    return w[..., low] * (1 - part) + w[..., (low + 1).clamp(max=n - 1)] * part


def kernel(m):
    """All taps, not yet normalised: [channels, d, kernel_dim 2^(S - 1 + init_scale)]."""
    S, size = m.num_scales, m.kernel_dim * 2 ** (m.num_scales - 1 + m.init_scale)
    k = torch.zeros(*m.kernel_list[0].shape[:2], size, dtype=wide(m.D).dtype)
    start = 0
    for i in range(S):
        times = 2 ** ((i if "sum" in m.mode else max(0, i - 1)) + m.init_scale)
        piece = stretched(wide(m.kernel_list[i]) * wide(m.multiplier) ** (S - i - 1), times, "nearest" in m.mode)
        end = start + piece.shape[-1]
        k = k + torch.nn.functional.pad(piece, (start, size - end))
        start = 0 if "sum" in m.mode else end
    if "learnable" in m.mode:
        k = k * torch.exp(-wide(m.decay)[:, None] * torch.log(1 + torch.arange(size).to(k.dtype)))
    return k


def plain(m, x, convolve=toeplitz):
    k = (kernel(m) / wide(m.kernel_norm))[..., : x.shape[1]]
    D = spread(m, "D", (*x.shape[:2], m.channels, DIM)).unbind(2)
    outs = []
    for c in range(m.channels):
        back = torch.cat((torch.zeros_like(k[0, :, :1]), k[m.channels + c]), -1) if m.bidirectional else None
        outs.append(convolve(x, k[c], D[c], back))
    y = torch.cat(outs, dim=-1)
    if m.linear:
        return y
    y = m.activation(y)
    if isinstance(m.output_linear, torch.nn.Linear):
        return m.output_linear(y)
    a = m.output_linear[0](y)
    return a[..., :DIM] * a[..., DIM:].sigmoid()


VARIANTS = {
    "three scales": {"decay_min": 1.0},
    "a shorter kernel than the input": {"l_max": 8, "kernel_dim": 4, "bidirectional": True},
    "a longer one": {"l_max": 60, "kernel_dim": 4},
    "two channels, both directions, glu": {"channels": 2, "bidirectional": True, "postact": "glu"},
    "one scale, stretched": {"l_max": 16, "init_scale": 2, "activation": "tanh"},
    "sum": {"mode": "sum_randn", "linear": True},
    "nearest, cosines": {"mode": "cat_cos_nearest", "n_scales": 2},
    "learnable decay": {"mode": "cat_randn_learnable", "decay_min": 0.3},
    "fixed decay": {"mode": "sum_cos_learnable_fixed", "init_scale": 1, "decay_min": 0.3},
}


def layer(**kwargs):
    return SGConv(DIM, **{"l_max": 16, "kernel_dim": 4, "transposed": False, **kwargs})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, dtype):
    m = randomise(layer(**kwargs)).to(dtype)
    check(m, plain, tokens(2, L, DIM, dtype=dtype), also=[functools.partial(plain, convolve=fourier)])


def test_autocast():
    check(randomise(layer(bidirectional=True)), plain, tokens(2, L, DIM), autocast=torch.bfloat16)


@pytest.mark.parametrize("L", [1, 2, 4, 5, 8, 15, 16, 31, 33])
def test_taps_at_every_length(L):
    """No more taps are interpolated than are needed: they are the first of all."""
    for kwargs in ({}, {"l_max": 32, "init_scale": 1}, {"mode": "sum_randn", "l_max": 32}, {"mode": "cat_cos_nearest"}):
        m = randomise(layer(**kwargs))
        expected = (kernel(m) / m.kernel_norm)[..., :L]
        torch.testing.assert_close(m.kernel(L), expected)


def test_initial_kernels_have_norm_one():
    for kwargs in ({}, {"bidirectional": True, "channels": 2}, {"mode": "sum_cos_learnable"}):
        m = layer(**kwargs)
        taps = m.kernel(10**3)
        assert taps.shape[-1] == 16
        torch.testing.assert_close(taps.norm(dim=-1), torch.ones(taps.shape[:2]))


def test_transposed_is_the_same():
    for kwargs in ({}, {"linear": True}):
        m, x = randomise(layer(**kwargs)), tokens(2, L, DIM)
        other = layer(transposed=True, **kwargs)
        other.load_state_dict(m.state_dict())
        torch.testing.assert_close(other(x.mT), m(x).mT)


def test_keys():
    """Those of the original's state_dict."""
    names = {"D", "kernel_list.0", "kernel_list.1", "kernel_list.2", "multiplier", "kernel_norm"}
    names |= {"kernel_norm_initialized", "output_linear.weight", "output_linear.bias"}
    m = layer(bidirectional=True)
    assert set(m.state_dict()) == names
    assert m.kernel_list[2].shape == (2, DIM, 4) and m.kernel_norm.shape == (2, DIM, 1)
    assert m.multiplier.shape == (1, DIM, 1)
    glu = (names | {"output_linear.0.weight", "output_linear.0.bias"}) - {"output_linear.weight", "output_linear.bias"}
    assert set(layer(postact="glu").state_dict()) == glu
    assert "decay" in dict(layer(mode="cat_randn_learnable").named_parameters())
    assert not layer(mode="cat_randn_learnable_fixed").decay.requires_grad


def test_the_number_of_scales():
    for l_max, kernel_dim, init_scale, expected in (
        (1024, 64, 0, 5),
        (1025, 64, 0, 6),
        (64, 64, 0, 1),
        (1024, 8, 2, 6),
    ):
        m = SGConv(2, l_max=l_max, kernel_dim=kernel_dim, init_scale=init_scale)
        assert m.num_scales == len(m.kernel_list) == expected
        assert m.kernel(10**5).shape[-1] == kernel_dim * 2 ** (expected - 1 + init_scale) >= l_max


def test_bad_arguments():
    for kwargs, message in (
        ({"l_max": 0}, "l_max must be >= 1, got 0"),
        ({"kernel_dim": 0}, "kernel_dim must be >= 1, got 0"),
        ({"channels": 0}, "channels must be >= 1, got 0"),
        ({"mode": "randn"}, "mode must be made of 'cat' or 'sum', got 'randn'"),
        ({"mode": "cat"}, "mode must be made of 'randn' or 'cos', got 'cat'"),
        ({"l_max": 2}, "l_max must be such that there is a scale of 4 taps, got 2"),
        ({"activation": "softplus"}, "activation must be one of .*, got 'softplus'"),
    ):
        with pytest.raises(ValueError, match=f"effvit::SGConv: {message}"):
            layer(**kwargs)


def test_dropout_is_active_in_training_only():
    m, x = randomise(layer(dropout=0.5)), tokens(2, L, DIM)
    assert not torch.equal(m(x), m(x))
    assert_bitwise_equal(m.eval()(x), m(x))


def test_the_rest():
    make = lambda **factory: layer(bidirectional=True, postact="glu", **factory)
    check_everything_else(randomise(make()), make, tokens(2, L, DIM))


def test_no_tokens():
    y = SGConv(DIM, l_max=8, kernel_dim=4, channels=2)(torch.zeros((2, DIM, 0)))
    assert y.shape == (2, DIM, 0)
    y.sum().backward()


@pytest.mark.parametrize("assign", [False, True])
def test_a_norm_that_was_not_initialised_is_that_of_what_is_loaded(assign):
    """The original computes it in the first call: a state_dict from before has ones and a flag that is False."""
    m, trained = (SGConv(DIM, l_max=8, kernel_dim=4) for _ in range(2))
    fresh = trained.state_dict() | {"kernel_norm_initialized": torch.tensor(False)}
    fresh["kernel_norm"] = torch.ones_like(trained.kernel_norm)
    m.load_state_dict(fresh, assign=assign)
    assert_bitwise_equal(m.kernel_norm, trained.kernel_norm)
    assert m.kernel_norm_initialized and not fresh["kernel_norm_initialized"]
    other = trained.state_dict() | {"kernel_norm": 2 * trained.kernel_norm}
    m.load_state_dict(other)  # one that was trained keeps its own
    assert_bitwise_equal(m.kernel_norm, other["kernel_norm"])
    parent = torch.nn.Sequential(SGConv(DIM, l_max=8, kernel_dim=4))
    parent.load_state_dict({f"0.{n}": t for n, t in fresh.items()})
    assert_bitwise_equal(parent[0].kernel_norm, trained.kernel_norm)
