"""effvit.layers.OrchidOperator against its formula: kernels of every sample in time, as circulant matrices."""

import functools

import pytest
import torch
from fft_formulas import fourier, implicit_taps, toeplitz, wide
from gated_formulas import convolved
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import OrchidOperator

L, DIM = 10, 6


def grouped(conv, x):
    """x [B, n, groups * a] -> [B, n, groups * b]: zeros beyond both ends."""
    reach = conv.kernel_size[0] // 2
    x = x.to(conv.weight.dtype)
    windows = torch.nn.functional.pad(x, (0, 0, reach, reach)).unfold(1, 2 * reach + 1, 1)  # [B, n, C, K]
    windows = windows.unflatten(2, (conv.groups, -1))
    weight = spread(conv, "weight", (*x.shape[:2], *conv.weight.shape)).unflatten(2, (conv.groups, -1))
    y = torch.einsum("bngik,bngoik->bngo", windows, weight).flatten(2)
    return y if conv.bias is None else y + spread(conv, "bias", y.shape)


def network(m, x):
    for i, (conv, norm) in enumerate(zip(m.conv1d_ls, m.norm_ls, strict=True)):
        x = grouped(conv, x)
        if i < len(m.conv1d_ls) - 1:
            x = 0.5 * x * (1 + torch.erf(x * 0.5**0.5))
        x = norm.norm_conv_kernel(x)
    return x


def transform(x, n):
    """The first n // 2 + 1 frequencies of the DFT of x [B, L, C] over n, by its matrix."""
    x = wide(x)
    angle = torch.arange(n // 2 + 1)[:, None].double() * torch.arange(x.shape[1]) * (2 * torch.pi / n)
    real, imaginary = (t.to(x.dtype) for t in (angle.cos(), -angle.sin()))
    return real @ x / n, imaginary @ x / n


def conditioned(m, x):
    """The adaptive part of the kernels in time, [B, C, L]."""
    c, length = m.conv_kernel_nn, x.shape[1]
    n = 2 * length if m.causal else length
    if c.kernel_type == "absfreq":
        a, b = transform(network(c.nn_model, x), n)
        power = a * a + b * b
        if c.network == "convtf":
            y = wide(network(c.nn_model2, power))
            spectrum = torch.complex(y[..., 0::2], y[..., 1::2])
        else:
            spectrum = torch.complex(power, torch.zeros_like(power))
    else:
        (ka, kb), (qa, qb) = (transform(network(f, x), n) for f in (c.nn_model_k, c.nn_model_q))
        real, imaginary = ka * qa + kb * qb, ka * qb - kb * qa
        if c.network == "convtf":
            real, imaginary = wide(network(c.nn_model_frq, torch.cat((real, imaginary), -1))).split(DIM, dim=-1)
        spectrum = torch.complex(real, imaginary)
    taps = torch.fft.irfft(spectrum.mT, n=n)
    return taps[..., :length] * n if m.causal else taps


def plain(m, x, convolve=toeplitz):
    length = x.shape[1]
    w = m.in_linear(x)
    k = conditioned(m, w[..., 2 * DIM :])
    fixed = wide(implicit_taps(m.fixed_conv, min(length, m.l_max)))
    fixed = torch.nn.functional.pad(fixed, (0, length - fixed.shape[-1])) / length
    k = fixed + (k / length if m.causal else k)
    x0, x1, v = convolved(m.conv1d_short, w).split(DIM, dim=-1)
    y = x0 * convolve(v * x1, k, spread(m.fixed_conv, "bias", v.shape), circular=True)
    if m.residual_long_conv is not None:
        f = m.fixed_conv_res
        taps = implicit_taps(f, min(length, m.l_max))
        y = y + convolve(x, taps, spread(f, "bias", x.shape), circular=True, scale=1 / length)
    return m.out_linear(y)


VARIANTS = {
    "as published": {},
    "power spectra alone": {"network": "convt", "residual_long_conv": None},
    "spectra": {"causal": False},
    "spectra of phase zero": {"causal": False, "network": "convt", "norm": "none"},
    "correlations": {"kernel_type": "corrTime", "causal": False, "network": "convt"},
    "correlations, their spectra convolved": {"kernel_type": "corrTime", "causal": False, "conv_bias": False},
    "two layers, an odd length, fewer taps": {"n_layer": 2, "causal": False, "l_max": 7, "conv_filter_size": 5},
    "two layers in time": {"n_layer": 2, "l_max": 7, "norm": "none"},
}


def layer(**kwargs):
    return OrchidOperator(DIM, **{"l_max": 12, "filter_order": 8, **kwargs})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, dtype):
    m = randomise(layer(**kwargs)).to(dtype)
    x = tokens(2, 9 if kwargs.get("n_layer") else L, DIM, dtype=dtype)
    check(m, plain, x, also=[functools.partial(plain, convolve=fourier)])


@pytest.mark.parametrize("causal", [True, False])
def test_autocast(causal):
    check(randomise(layer(causal=causal)), plain, tokens(2, L, DIM), autocast=torch.bfloat16)


def test_samples_have_their_own_kernels():
    """A sample's output does not depend on the others; its kernel does depend on it."""
    m, x = randomise(layer()).eval(), tokens(3, L, DIM)
    torch.testing.assert_close(m(x)[1:2], m(x[1:2]))
    kernels = conditioned(m, m.in_linear(x)[..., 2 * DIM :])
    assert not torch.allclose(kernels[0], kernels[1], rtol=0.1)


def test_shifts_move_the_output():
    """Up to the ends: with kernels of power spectra, which do not move, circular shifts are followed inside."""
    m = randomise(layer(causal=False, network="convt", norm="none", residual_long_conv=None, l_max=40)).eval()
    x = torch.zeros(1, 40, DIM)
    x[:, 10:20] = tokens(1, 10, DIM)
    m.in_linear.bias.data.zero_()
    m.conv1d_short.bias.data.zero_()
    m.conv_kernel_nn.nn_model.conv1d_ls[0].bias.data.zero_()
    torch.testing.assert_close(m(x.roll(7, 1)), m(x).roll(7, 1))


def test_keys():
    """Those of the original's state_dict."""
    both = lambda *names: {f"{n}.{p}" for n in names for p in ("weight", "bias")}
    names = both("in_linear", "out_linear", "conv1d_short")
    for f in ("fixed_conv", "fixed_conv_res"):
        names |= both(*(f"{f}.implicit_filter.{i}" for i in (0, 2, 4)))
        names |= {f"{f}.implicit_filter.{n}" for n in ("1.freq", "3.freq", "5.freq", "6.weight")}
        names |= {f"{f}.{n}" for n in ("bias", "pos_emb.z", "pos_emb.t", "modulation.deltas")}

    def network(name):
        return both(f"conv_kernel_nn.{name}.conv1d_ls.0", f"conv_kernel_nn.{name}.norm_ls.0.norm_conv_kernel")

    m = layer()
    assert set(m.state_dict()) == names | network("nn_model") | network("nn_model2")
    assert m.conv_kernel_nn.nn_model2.conv1d_ls[0].weight.shape == (2 * DIM, 1, 3)
    m = layer(kernel_type="corrTime", causal=False)
    assert set(m.state_dict()) == names | network("nn_model_k") | network("nn_model_q") | network("nn_model_frq")
    assert m.conv_kernel_nn.nn_model_frq.conv1d_ls[0].weight.shape == (2 * DIM, 2, 3)


def test_bad_arguments():
    for kwargs, message in (
        ({"l_max": 0}, "OrchidOperator: l_max must be >= 1, got 0"),
        ({"kernel_type": "freq"}, "OrchidOperator: kernel_type must be one of .*, got 'freq'"),
        ({"network": "convf"}, "OrchidOperator: network must be one of .*, got 'convf'"),
        ({"norm": "batchnorm"}, "OrchidOperator: norm must be 'layernorm' or 'none', got 'batchnorm'"),
        ({"conv_filter_size": 4}, "OrchidOperator: conv_filter_size must be odd, got 4"),
        ({"n_layer": 0}, "OrchidOperator: n_layer must be >= 1, got 0"),
        ({"kernel_type": "corrTime"}, "OrchidOperator: causal must be False with 'corrTime', got True"),
        ({"residual_long_conv": "lconv"}, "OrchidOperator: residual_long_conv must be 'sconv' or None, got 'lconv'"),
        ({"bidirectional": True}, "OrchidOperator: bidirectional must be False: convolutions are circular, got True"),
        ({"emb_dim": 2}, "HyenaFilter: emb_dim must be odd"),
    ):
        with pytest.raises(ValueError, match=f"effvit::{message}"):
            layer(**kwargs)


def test_autocast_keeps_spectra_in_float32():
    """The network from tokens to kernels computes in the dtype of its parameters: autocast changes nothing in it."""
    m, x = randomise(layer()).eval(), tokens(2, L, DIM)
    seen = []
    m.conv_kernel_nn.register_forward_hook(lambda _, args, h: seen.append((args[0], h)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m(x)
    ((w, h),) = seen
    assert w.dtype == torch.float32 and h.dtype == torch.complex64
    assert_bitwise_equal(torch.view_as_real(m.conv_kernel_nn(w)), torch.view_as_real(h))


@pytest.mark.parametrize("causal", [True, False])
def test_the_rest(causal):
    make = lambda **factory: layer(causal=causal, **factory)
    check_everything_else(randomise(make()), make, tokens(2, L, DIM))


def test_no_tokens():
    y = OrchidOperator(DIM, 8)(torch.zeros((2, 0, DIM)))
    assert y.shape == (2, 0, DIM)
    y.sum().backward()
