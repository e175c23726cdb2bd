"""effvit.layers.GlobalFilter and SpectFormerBlock against torch.fft and against circular convolutions."""

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, randomise, tokens

from effvit.layers import GlobalFilter, SpectFormerBlock
from effvit.testing import assert_bitwise_equal

C = 12
SIZES = [(6, 6), (5, 7), (4, 9), (1, 8)]


def caller(size):
    return lambda m, x: m(x, size)


def filtered(m, x, size):
    """rfft2, product, irfft2, as the original has it; torch.fft knows no half precision on the CPU."""
    wide = torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfft2(x.unflatten(1, size).to(wide), dim=(1, 2), norm="ortho")
    spectrum = spectrum * torch.view_as_complex(m.complex_weight.to(wide))
    return torch.fft.irfft2(spectrum, s=size, dim=(1, 2), norm="ortho").flatten(1, 2).to(x.dtype)


def convolved(m, x, size):
    """A circular convolution of channels-first maps by complex transforms, with the kernel of that spectrum."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = torch.view_as_complex(m.complex_weight.to(wide)).permute(2, 0, 1)
    kernel = torch.fft.irfft(torch.fft.ifft(weight, dim=1), n=size[1], dim=2)
    maps = x.unflatten(1, size).permute(0, 3, 1, 2).to(wide)
    y = torch.fft.ifft2(torch.fft.fft2(maps) * torch.fft.fft2(kernel)).real
    return y.permute(0, 2, 3, 1).flatten(1, 2).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_filter_like_the_formula(size, dtype):
    m = randomise(GlobalFilter(C, size[0], size[1] // 2 + 1)).to(dtype)
    x = tokens(3, size[0] * size[1], C, dtype=dtype)
    plain, also = (lambda m, x, f=f: f(m, x, size) for f in (filtered, convolved))
    check(m, plain, x, also=(also,), call=caller(size))


def test_filter_of_a_square_map_needs_no_size():
    m, x = randomise(GlobalFilter(C, 6, 4)), tokens(2, 36, C)
    assert_bitwise_equal(m(x), m(x, (6, 6)))


def test_everything_else_of_the_filter():
    make = lambda **factory: GlobalFilter(C, 4, 4, **factory)
    check_everything_else(randomise(make()), make, tokens(2, 24, C), call=caller((4, 6)))


def test_filter_under_autocast_computes_in_the_dtype_of_its_input():
    m, x = randomise(GlobalFilter(C, 6, 4)), tokens(2, 36, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_bitwise_equal(m(x), m(x.clone()))
        assert m(x).dtype == torch.float32


def test_keys_and_start_of_the_filter():
    """The original's: complex_weight [h, w, dim, 2], normal with a deviation of 0.02."""
    torch.manual_seed(0)
    m = GlobalFilter(C, h=28, w=15)
    assert {n: tuple(p.shape) for n, p in m.state_dict().items()} == {"complex_weight": (28, 15, C, 2)}
    assert 0.019 < float(m.complex_weight.std()) < 0.021


def test_maps_of_another_size_are_refused():
    m = GlobalFilter(C, 6, 4)
    with pytest.raises(
        ValueError, match=r"effvit::GlobalFilter: x must be \[B, N, C\] of a square map, got \[2, 35, 12\]"
    ):
        m(tokens(2, 35, C))
    with pytest.raises(ValueError, match=r"effvit::GlobalFilter: x must be \[B, N, C\] of a map of 5 x 6, got"):
        m(tokens(2, 36, C), (5, 6))
    with pytest.raises(ValueError, match=r"effvit::GlobalFilter: x must be a map of 6 x 6 or 7, got 9 x 4"):
        m(tokens(2, 36, C), (9, 4))


# ---- the block -----------------------------------------------------------------------------------------------------


def plain_block(m, x, size, form=filtered):
    y = m.mlp.fc2(m.mlp.act(m.mlp.fc1(m.norm2(form(m.filter, m.norm1(x), size)))))
    return x + (y if m.gamma is None else m.gamma * y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size, init_values", [((6, 6), None), ((5, 7), 1e-5)], ids=str)
def test_block_like_the_formula(size, init_values, dtype):
    m = randomise(SpectFormerBlock(C, 2.0, h=size[0], w=size[1] // 2 + 1, init_values=init_values)).to(dtype)
    x = tokens(2, size[0] * size[1], C, dtype=dtype)
    also = lambda m, x: plain_block(m, x, size, convolved)
    check(m, lambda m, x: plain_block(m, x, size), x, also=(also,), call=caller(size))


def test_everything_else_of_the_block():
    make = lambda **factory: SpectFormerBlock(C, 2.0, h=4, w=4, init_values=0.1, **factory)
    check_everything_else(randomise(make()), make, tokens(2, 24, C), call=caller((4, 6)))


def test_keys_of_the_block():
    """SpectFormer's and GFNet's; gamma where there is a layer scale."""
    expected = {"filter.complex_weight"}
    expected |= {f"{n}.{p}" for n in ("norm1", "norm2", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")}
    m = SpectFormerBlock(C, 3.0)
    assert m.state_dict().keys() == expected and m.mlp.fc1.out_features == 3 * C
    assert m.filter.complex_weight.shape == (14, 8, C, 2)
    scaled = SpectFormerBlock(C, init_values=1e-5)
    assert scaled.state_dict().keys() == expected | {"gamma"}
    assert_bitwise_equal(scaled.gamma.detach(), torch.full((C,), 1e-5))


def test_drop_path_of_the_block():
    """A sample keeps its input, or has the branch divided by the share that is kept."""
    torch.manual_seed(0)
    m, x = randomise(SpectFormerBlock(C, drop_path=0.5, h=6, w=4)), tokens(64, 36, C)
    with torch.no_grad():
        branch, y = m.eval()(x) - x, m.train()(x)
    dropped = (y == x).flatten(1).all(1)
    assert 16 < int(dropped.sum()) < 48
    torch.testing.assert_close(y[~dropped], (x + 2 * branch)[~dropped])
