"""int_layer_norm: the shared suite, and the same bits as int64 NumPy on every backend."""

import int_oracle
import pytest
import torch
import torch.nn.functional as F
from integer_suite import IntegerSuite, numpy_dtype

import effvit
from effvit.integer import layer_norm_constants as constants
from effvit.testing.int_layer_norm import SPEC


class TestIntLayerNorm(IntegerSuite):
    spec = SPEC

    def oracle(self, args, kwargs):
        options = self.spec.declared.complete(kwargs)
        dtype = numpy_dtype(options.pop("out_dtype"))
        return int_oracle.int_layer_norm(*(None if a is None else a.numpy() for a in args), **options, dtype=dtype)


def _call(c=96):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(5, c, generator=generator) * 2000 + 300).round().to(torch.int32)
    return x, 0.5 + torch.rand(c, generator=generator), torch.randn(c, generator=generator)


def test_public_function():
    x, weight, bias = _call()
    expected = F.layer_norm(x.double(), (96,), weight.double(), bias.double(), eps=0.0)
    for options in ({}, {"square_root": "exact"}, {"deployed": True}):
        y = effvit.int_layer_norm(x, constants(weight, bias)[0], **options)
        assert y.dtype == torch.int32
        assert (y.double() * weight.double() * 96**0.5 / 2**30 - expected).abs().max() < 0.01
        q = effvit.int_layer_norm(x, *constants(weight, bias, 0.03), **options, out_dtype=torch.int8)
        assert (q.double() * 0.03 - expected.clamp(-128 * 0.03, 127 * 0.03)).abs().max() < 0.03


def test_newton_is_wide_of_small_sums():
    """k = 64 where all of a row is equal, and above the root for small sums of squares; the exact one is not."""
    x = torch.tensor([[5, 5, 5, 5], [5, 6, 4, 5]], dtype=torch.int32)
    assert effvit.ops.int_layer_norm(x)[0].eq(0).all()
    newton, exact = (effvit.ops.int_layer_norm(x, square_root=s)[1, 1].item() for s in ("newton", "exact"))
    assert newton == (2**31 - 1) // 64 >> 1 and exact == (2**31 - 1) // 1 >> 1


def test_constants():
    x, weight, bias = _call()
    integers, m, c, offset = constants(weight, bias, 0.02)
    step = weight.double() * 96**0.5 / 2**30
    assert torch.equal(integers.double(), (bias.double() / step).floor()) and offset is None
    assert (m.double() / 2.0 ** c.double() / (step / 0.02) - 1).abs().max() < 2.0**-30
    assert constants(weight, None, 0.02)[0] is None and constants(weight)[1:] == (None, None, None)
    weight[3] = 0
    with pytest.raises(ValueError, match=r"bias must be below 2 sqrt\(C\) \|weight\| where .* got .* at \[3\]"):
        constants(weight, bias)
    bias[3] = 0
    integers, m, c, offset = constants(weight, bias, 0.02)
    assert integers[3] == 0 and m[3] == 0 and 1 <= c.min() and c.max() <= 61 and offset is None
    assert effvit.int_layer_norm(x, integers, m, c, out_dtype=torch.int8)[:, 3].eq(0).all()
    with pytest.raises(ValueError, match="square_root must be one of newton, exact, got 'float'"):
        effvit.int_layer_norm(x, square_root="float")
    for wrong in (torch.nan, torch.inf):
        bias[3] = wrong
        with pytest.raises(ValueError, match="bias must be finite"):
            constants(weight, bias, 0.02)
    bias[3] = 1e9
    with pytest.raises(ValueError, match=r"out_scale must be above 2\^-31 \|bias\|, got 0.02"):
        constants(weight, bias, 0.02)
    with pytest.raises(ValueError, match="out_scale must be"):
        constants(weight, bias, 0.0)


@pytest.mark.parametrize("factor", [0.0, 1e-12, 1e-9, 1e-7, 1e-4, 0.01, -0.01, 0.03, 1.0])
def test_pruned_channels(factor):
    """Weights that training has made small, of biases that are not: as near to the formula as other channels are."""
    x, weight, bias = _call()
    weight[::3] *= factor
    bias = bias + 20 * bias.sign() * (torch.arange(96) % 2)
    for out_scale, dtype in ((0.2, torch.int8), (0.001, torch.int16), (1e-5, torch.int32)):
        assert not (factor < 0.01 and out_scale == 0.2) or constants(weight, bias, out_scale)[3] is not None
        y = effvit.int_layer_norm(x, *constants(weight, bias, out_scale), square_root="exact", out_dtype=dtype)
        info = torch.iinfo(dtype)
        norm = effvit.int_layer_norm(x, square_root="exact").double() * 96**0.5 / 2**30
        expected = ((norm * weight.double() + bias.double()) / out_scale).clamp(info.min, info.max)
        error = (y.double() - expected).abs().amax(0)
        assert error[::3].max() <= 1.0 and error.max() <= 1.0


def test_layer_norm_of_a_pruned_model():
    """A third of the channels is pruned; the whole against floating point."""
    x, weight, bias = _call()
    weight[::3] = torch.tensor([0.0, 1e-30, -1e-8, 1e-4]).repeat(8)
    y = effvit.int_layer_norm(x, *constants(weight, bias * 3, 0.1), out_dtype=torch.int8)
    expected = F.layer_norm(x.double(), (96,), weight.double(), bias.double() * 3, eps=0.0)
    assert (y.double() * 0.1 - expected.clamp(-12.8, 12.7)).abs().max() < 0.1
