"""effvit.layers.HyperZZWGlobal and HyperZZWLocal against their formulas, the slow networks written out."""

import pytest
import torch
from fft_formulas import wide
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import HyperZZWGlobal, HyperZZWLocal

SIZE, DIM, K = 5, 6, 3


def slow(net, x=None):
    """[channels, size, size]"""
    at = torch.arange(net.size).double() * 2 / max(net.size - 1, 1) - 1
    grid = torch.stack(torch.meshgrid(at, at, indexing="ij"))[None].to(net.output_linear.weight.dtype)
    bias = spread(net, "bias_p" if x is None else "bias_pk", (1, net.output_linear.in_channels, net.size, net.size))
    if x is not None:
        rows, columns = (
            [(i * n // net.size, -(-(i + 1) * n // net.size)) for i in range(net.size)] for n in x.shape[2:]
        )
        cells = [x[:, :, a:b, c:d].mean((2, 3)) for a, b in rows for c, d in columns]
        pooled = net.fast_reduce(torch.stack(cells, -1).unflatten(-1, (net.size, net.size)))
        pooled = net.fast_fc1(pooled.sum(0, keepdim=True) / len(x))
        pooled = pooled * 0.5 * (1 + torch.erf(pooled * 0.5**0.5))
    h = torch.sin(net.filters[0].linear(grid))
    for i, linear in enumerate(net.linears):
        h = torch.sin(net.filters[i + 1].linear(grid)) * linear(h) + bias
        if x is not None:
            h = h.detach() + 0.1 * h / h.square().sum((2, 3), keepdim=True).sqrt()
            h = h * net.fast_linears_x[i](pooled)
    return net.output_linear(h)[0]


def products(m, x):
    return torch.einsum("bcij,bcjk->bcik", x * slow(m.slow_net.Kernel).to(x.dtype), x)


def local(m, x):
    kernel = slow(m.slow_net.Kernel, x)
    reach = m.kernel_size // 2
    windows = torch.nn.functional.pad(x, (reach,) * 4).unfold(2, m.kernel_size, 1).unfold(3, m.kernel_size, 1)
    y = m.local_conv.channel_mixer((wide(windows) * wide(kernel)[:, None, None]).sum((-2, -1)).to(x.dtype))
    wider = wide(y)
    variance, mean = torch.var_mean(wider, (0, 2, 3), correction=0, keepdim=True)
    y = ((wider - mean) / (variance + 1e-5).sqrt()).to(y.dtype)
    y = y * 0.5 * (1 + torch.erf(y * 0.5**0.5))
    return y + spread(m, "fast_bias", y.shape)


def layer(cls=HyperZZWLocal, **kwargs):
    return cls(DIM, K if cls is HyperZZWLocal else SIZE, **{"hidden_channels": 8, "num_layers": 2, **kwargs})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_global_like_the_formula(num_layers, dtype):
    m = randomise(layer(HyperZZWGlobal, num_layers=num_layers)).to(dtype)
    check(m, products, tokens(2, DIM, SIZE, SIZE, dtype=dtype), is_map=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_layers, H, W", [(1, 4, 5), (3, 7, 3), (2, 2, 2)])
def test_local_like_the_formula(num_layers, H, W, dtype):
    m = randomise(layer(num_layers=num_layers)).to(dtype)
    check(m, local, tokens(2, DIM, H, W, dtype=dtype), is_map=True)


@pytest.mark.parametrize("cls, formula", [(HyperZZWGlobal, products), (HyperZZWLocal, local)])
def test_autocast(cls, formula):
    check(randomise(layer(cls)), formula, tokens(2, DIM, SIZE, SIZE), is_map=True, autocast=torch.bfloat16)


def test_two_maps():
    """The kernel multiplies or is made of the first one, the second one is multiplied or convolved."""
    x, other = tokens(2, DIM, SIZE, SIZE), tokens(2, DIM, SIZE, SIZE, seed=5)
    m = randomise(layer(HyperZZWGlobal))
    torch.testing.assert_close(m(x, other), (x * slow(m.slow_net.Kernel)) @ other)
    m = randomise(layer())
    both = m(x, other)
    assert not torch.allclose(both, m(other)) and not torch.allclose(both, m(x))
    kernel = m.slow_net(x)
    m.slow_net.forward = lambda _: kernel  # that of x, whatever is given
    assert_bitwise_equal(m(other), both)


def test_initial_kernels():
    """A gamma distribution of frequencies, and a last layer scaled by the number of taps."""
    torch.manual_seed(0)
    m = HyperZZWGlobal(64, 16, hidden_channels=256, num_layers=2, omega_0=10.0)
    net = m.slow_net.Kernel
    weights = [
        f.linear.weight.detach().abs().mean() for f in net.filters
    ]  # uniform up to 1/sqrt(2), times 2 pi 10 gamma
    for i, w in enumerate(weights):
        expected = 0.5 / 2**0.5 * 2 * torch.pi * 10 * 6 / (i + 1)
        assert 0.8 * expected < float(w) < 1.2 * expected
    assert (net.linears[0].bias == 1).all() and (net.filters[1].linear.bias == 0).all()
    assert float(net.output_linear.weight.detach().std()) == pytest.approx((1 / 256) ** 0.5 / 16, rel=0.1)


def test_keys():
    """Those of the original's state_dict, and the size that it keeps as a buffer."""
    both = lambda *names: {f"slow_net.Kernel.{n}.{p}" for n in names for p in ("weight", "bias")}
    sines = both("linears.0", "linears.1", "output_linear", *(f"filters.{i}.linear" for i in range(3)))
    m = layer(HyperZZWGlobal)
    assert set(m.state_dict()) == sines | {"slow_net.Kernel.bias_p"}
    m.load_state_dict(m.state_dict() | {"slow_net.train_length": torch.tensor([SIZE])}, strict=True)
    context = both("fast_reduce", "fast_fc1", "fast_linears_x.0", "fast_linears_x.1") | {"slow_net.Kernel.bias_pk"}
    mixer = {"local_conv.channel_mixer.weight", "local_conv.channel_mixer.bias", "fast_bias"}
    m = layer()
    assert set(m.state_dict()) == sines | context | mixer
    assert m.slow_net.Kernel.bias_pk.shape == (1, 1, K, K) and m.slow_net.Kernel.linears[0].weight.shape == (8, 8, 1, 1)


def test_bad_arguments():
    for call, message in (
        (lambda: HyperZZWGlobal(DIM, 0), "HyperZZWGlobal: size must be >= 1, got 0"),
        (lambda: HyperZZWGlobal(DIM, 3, num_layers=0), "HyperZZWGlobal: num_layers must be >= 1, got 0"),
        (lambda: HyperZZWLocal(DIM, 4), "HyperZZWLocal: kernel_size must be odd, got 4"),
        (lambda: HyperZZWLocal(DIM, 3, num_layers=0), "HyperZZWLocal: num_layers must be >= 1, got 0"),
        (
            lambda: layer(HyperZZWGlobal)(tokens(2, DIM, SIZE, 4)),
            r"HyperZZWGlobal: x must be \[B, 6, 5, 5\], got \[2, 6, 5, 4\]",
        ),
    ):
        with pytest.raises(ValueError, match=f"effvit::{message}"):
            call()


@pytest.mark.parametrize("cls", [HyperZZWGlobal, HyperZZWLocal])
def test_the_rest(cls):
    make = lambda **factory: layer(cls, **factory)
    check_everything_else(randomise(make()), make, tokens(2, DIM, SIZE, SIZE))


def test_a_kernel_of_one_tap_in_float64():
    m, x = HyperZZWLocal(4, 1).double(), tokens(2, 4, 5, 3).double()
    torch.testing.assert_close(m(x), local(m, x))
