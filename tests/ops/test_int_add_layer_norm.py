"""int_add_layer_norm: the shared suite, and the same bits as int64 NumPy on every backend."""

import int_oracle
import torch
from integer_suite import IntegerSuite, numpy_dtype

import effvit
from effvit.integer import layer_norm_constants, multipliers
from effvit.testing import assert_bitwise_equal, backends
from effvit.testing.int_add_layer_norm import SPEC


class TestIntAddLayerNorm(IntegerSuite):
    spec = SPEC

    def oracle(self, args, kwargs):
        options = self.spec.declared.complete(kwargs)
        dtype = numpy_dtype(options.pop("out_dtype"))
        return int_oracle.int_add_layer_norm(*(None if a is None else a.numpy() for a in args), **options, dtype=dtype)


def _call(columns=96):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (3, 7, columns), generator=generator).to(torch.int8)
    residual = torch.randint(-20000, 20000, (3, 7, columns), generator=generator).to(torch.int16)
    weight, bias = 0.5 + torch.rand(columns, generator=generator), torch.randn(columns, generator=generator)
    return x, residual, weight, bias


def test_public_function():
    """Of floats that the integers stand for: the sum, and its LayerNorm."""
    x, residual, weight, bias = _call()
    scales = (*multipliers(0.05, 0.001, x), *multipliers(0.0004, 0.001, x))
    y, total = effvit.ops.int_add_layer_norm(
        x, residual, *scales, *layer_norm_constants(weight, bias, 0.03), out_dtype=torch.int8
    )
    assert (y.dtype, total.dtype) == (torch.int8, torch.int16)
    expected = x.double() * 0.05 + residual.double() * 0.0004
    assert (total.double() * 0.001 - expected).abs().max() <= 0.001
    norm = torch.nn.functional.layer_norm(total.double(), (96,), weight.double(), bias.double(), eps=0.0)
    assert (y.double() * 0.03 - norm.clamp(-128 * 0.03, 127 * 0.03)).abs().max() < 0.03


def test_is_requantize_and_int_layer_norm():
    x, residual, weight, bias = _call()
    scales = [multipliers(s, 0.001, x) for s in (0.05, 0.0004)]
    constants = layer_norm_constants(weight, bias, 0.03)
    for backend in backends("int_add_layer_norm"):
        if backend.slow:
            continue
        with backend.selected():
            y, total = effvit.ops.int_add_layer_norm(x, residual, *scales[0], *scales[1], *constants, bits=14)
            alone = effvit.ops.requantize(x, *scales[0], residual, *scales[1], bits=14, out_dtype=torch.int16)
            assert_bitwise_equal(total, alone)
            assert_bitwise_equal(y, effvit.ops.int_layer_norm(alone, *constants))
