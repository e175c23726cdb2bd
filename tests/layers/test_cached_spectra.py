"""cache_spectra: layers compute the same with spectra made once, and only where nothing else would be right."""

import copy
import pickle

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
        for again in (copy.deepcopy(m), copy.deepcopy(copy.deepcopy(m)), pickle.loads(pickle.dumps(m))):
            assert_bitwise_equal(without_kernels(again)(x), m(x))
    assert not any("spectr" in name for name in m.state_dict())


def test_other_parameters_are_not_missed(layer):
    """Those of functional_call, of a submodule loaded, cast or moved, changed in place or replaced, and buffers."""
    m, size, x = layer
    named = (*m.named_parameters(), *m.named_buffers())
    other = {n: t.detach() + 0.25 for n, t in named if t.is_floating_point()}  # a tied one has one name here
    with torch.no_grad():
        expected = copy.deepcopy(m).cache_spectra()
        expected.load_state_dict(other, strict=False)
        expected = expected(x)

        def right(m):
            torch.testing.assert_close(m(x), expected)

        assert not torch.allclose(m.cache_spectra(*size)(x), expected)
        without_kernels(m)(x)
        del m._kernels
        right(lambda x: torch.func.functional_call(m, other, (x,)))
        without_kernels(m)(x)  # the others were there for one call
        del m._kernels
        for change in (
            lambda t, value: t.copy_(value),
            lambda t, value: setattr(t, "data", value.clone()),
        ):
            changed = copy.deepcopy(m)
            for n, t in (*changed.named_parameters(), *changed.named_buffers()):
                if n in other:
                    change(t, other[n])
            right(changed)
        replaced = copy.deepcopy(m)
        for module in replaced.modules():
            for n, p in [*module._parameters.items()]:
                if p is not None:
                    setattr(module, n, torch.nn.Parameter(p + 0.25))
        for n, b in replaced.named_buffers():
            b.copy_(other.get(n, b))
        right(replaced)


def test_a_submodule_loaded_or_cast_is_not_missed():
    m, u = layers.LongConv(DIM, 16).eval(), tokens(2, DIM, L)
    other = layers.LongConv(DIM, 16)
    with torch.no_grad():
        loaded = copy.deepcopy(m).cache_spectra(L)
        loaded.kernel.load_state_dict(other.kernel.state_dict())
        cast = copy.deepcopy(m).cache_spectra(L)
        cast.kernel.bfloat16()
        back = copy.deepcopy(m).cache_spectra(L)
        back.kernel.bfloat16().float()  # may lie where it lay before
        for changed in (loaded, cast, back):
            assert_bitwise_equal(changed(u), copy.deepcopy(changed).cache_spectra()(u))
            assert not torch.equal(changed(u), m(u))
            assert copy.deepcopy(changed)._spectra is None


def test_training_mode_has_none():
    """It would keep one draw of the kernels' dropout."""
    m = layers.LongConv(DIM, 16, kernel_dropout=0.5)
    message = "effvit::LongConv: cache_spectra must be called in evaluation mode, got training mode"
    for wrong in (m, copy.deepcopy(m).eval()):
        wrong.kernel.train()
        with pytest.raises(ValueError, match=message):
            wrong.cache_spectra(L)
    m.cache_spectra()
    m.eval().cache_spectra(L)


def test_compiled_without_computing_kernels():
    m, u = layers.LongConv(DIM, 16).eval(), tokens(2, DIM, L)
    with torch.no_grad():
        expected = m.cache_spectra(L)(u)
        compiled = torch.compile(without_kernels(m), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(u), expected)


def test_learned_transforms_have_none():
    message = "effvit::FlashButterfly: cache_spectra must be of an FFT, got learned transforms"
    with pytest.raises(ValueError, match=message):
        layers.FlashButterfly(DIM, 8).eval().cache_spectra(8)
