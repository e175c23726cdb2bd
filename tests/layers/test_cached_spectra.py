"""cache_spectra: layers compute the same with spectra made once, and only where nothing else would be right."""

import copy

import pytest
import torch
from layer_suite import DTYPES, randomise, tokens

from effvit import layers
from effvit._accuracy import assert_bitwise_equal, assert_close_to_truth

L, DIM = 11, 6
LAYERS = {
    "HyenaOperator": (lambda: layers.HyenaOperator(DIM, 8, order=3, filter_order=5), (L,), (L, DIM)),
    "HyenaOperator, both": (lambda: layers.HyenaOperator(DIM, L, filter_order=5, bidirectional=True), (L,), (L, DIM)),
    "HyenaND": (lambda: layers.HyenaND(DIM, 4, order=3, filter_order=5), (3, 5), (3, 5, DIM)),
    "HyenaND, four directions": (
        lambda: layers.HyenaND(DIM, 5, directional_mode="4dir", direct_paramtrization=True), (4, 4), (16, DIM)
    ),
    "LongConv": (lambda: layers.LongConv(DIM, 16, channels=2, bidirectional=True, lam=0.05), (L,), (DIM, L)),
    "SGConv": (
        lambda: layers.SGConv(DIM, l_max=8, kernel_dim=4, channels=2, bidirectional=True, transposed=False),
        (L,), (L, DIM),
    ),
    "MultiHeadEMA": (lambda: layers.MultiHeadEMA(DIM, 3), (L,), (L, DIM)),
    "MultiHeadEMA, both": (lambda: layers.MultiHeadEMA(DIM, 3, bidirectional=True, truncation=4), (L,), (L, DIM)),
}  # fmt: skip


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def layer(request):
    """(module in eval mode, size, input)"""
    make, size, shape = request.param
    return randomise(make()).eval(), size, tokens(2, *shape)


def without_kernels(m):
    """A call that fails where the layer computes its kernels."""

    def refuse(size):
        raise AssertionError("kernels were computed")

    m._kernels = refuse
    return m


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_without_computing_kernels(layer, dtype):
    m, size, x = layer
    m, x = m.to(dtype), x.to(dtype)
    with torch.no_grad():
        truth, expected = copy.deepcopy(m).double()(x.double()), m(x)
        found = without_kernels(copy.deepcopy(m).cache_spectra(*size))(x)
    magnitude = truth.abs().max().expand_as(truth)
    assert_close_to_truth(found, truth, expected, magnitude=magnitude)


def test_float64(layer):
    m, size, x = layer
    m, x = m.double(), x.double()
    with torch.no_grad():
        expected = m(x)
        torch.testing.assert_close(without_kernels(m.cache_spectra(*size))(x), expected)


def test_when_kernels_are_computed_all_the_same(layer):
    """Derivatives, another size, another dtype, training, and whatever changes the parameters."""
    m, size, x = layer
    state = copy.deepcopy(m.state_dict())

    def computes(m, x):
        with pytest.raises(AssertionError, match="kernels were computed"):
            without_kernels(m)(x)
        del m._kernels

    computes(m.cache_spectra(*size), x)  # parameters want gradients
    with torch.no_grad():
        without_kernels(m)(x)
        del m._kernels
        computes(m, x[..., :4] if type(m) is layers.LongConv else x[:, :4] if x.dim() == 3 else x[:, :, :4])
        computes(copy.deepcopy(m).cache_spectra(), x)
        computes(copy.deepcopy(m).cache_spectra(*size).train().eval(), x)
        computes(copy.deepcopy(m).cache_spectra(*size).double(), x.double())
        other = copy.deepcopy(m).cache_spectra(*size)
        other.load_state_dict(state)
        computes(other, x)
    m.requires_grad_(False)
    without_kernels(m)(x)
    with pytest.raises(AssertionError, match="kernels were computed"):
        torch.func.jvp(m, (x,), (x,))
    x.requires_grad_()
    with pytest.raises(AssertionError, match="kernels were computed"):
        m(x)


def test_a_copy_has_them_and_the_state_dict_has_not(layer):
    m, size, x = layer
    m.cache_spectra(*size)
    with torch.no_grad():
        assert_bitwise_equal(without_kernels(copy.deepcopy(m))(x), m(x))
    assert not any("spectr" in name for name in m.state_dict())


def test_learned_transforms_have_none():
    message = "effvit::FlashButterfly: cache_spectra must be of an FFT, got learned transforms"
    with pytest.raises(ValueError, match=message):
        layers.FlashButterfly(DIM, 8).cache_spectra(8)
