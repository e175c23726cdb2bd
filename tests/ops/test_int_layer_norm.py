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
    _, weight, bias = _call()
    integers, m, c = constants(weight, bias, 0.02)
    step = weight.double() * 96**0.5 / 2**30
    assert torch.equal(integers.double(), (bias.double() / step).floor())
    assert (m.double() / 2.0 ** c.double() / (step / 0.02) - 1).abs().max() < 2.0**-30
    weight[3] = 0
    with pytest.raises(ValueError, match=r"bias must be below 2 sqrt\(C\) \|weight\|, got .* at \[3\]"):
        constants(weight, bias, 0.02)
    bias[3] = 0
    integers, m, c = constants(weight, bias, 0.02)
    assert integers[3] == 0 and m[3] == 0 and 1 <= c.min() and c.max() <= 61
    x = _call()[0]
    assert effvit.int_layer_norm(x, integers, m, c, out_dtype=torch.int8)[:, 3].eq(0).all()
    with pytest.raises(ValueError, match="square_root must be one of newton, exact, got 'float'"):
        effvit.int_layer_norm(x, square_root="float")
