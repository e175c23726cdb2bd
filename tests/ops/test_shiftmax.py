"""shiftmax: the shared suite, and the same bits as int64 NumPy on every backend."""

import int_oracle
import pytest
import torch
from integer_suite import IntegerSuite, numpy_dtype

import effvit
from effvit.testing.shiftmax import SPEC


class TestShiftmax(IntegerSuite):
    spec = SPEC

    def oracle(self, args, kwargs):
        options = self.spec.declared.complete(kwargs)
        dtype = numpy_dtype(options.pop("out_dtype"))
        return int_oracle.shiftmax(args[0].numpy(), **options, dtype=dtype)


def test_public_function():
    x = torch.randint(-300, 300, (4, 50), dtype=torch.int32)
    scale = 0.04
    y = effvit.ops.shiftmax(x, scale)
    assert y.dtype == torch.int8
    expected = torch.softmax(x.double() * scale, -1)
    assert (y.double() / 128 - expected).abs().max() < 0.03  # the shift exponential alone is off by 0.02
    assert torch.equal(y, effvit.ops.shiftmax(x, torch.tensor(scale, dtype=torch.float64)))
    wide = effvit.ops.shiftmax(x, scale, bits=16, out_dtype=torch.int16)
    assert torch.equal(y, (wide >> 8).to(torch.int8))


def test_constants_of_the_scale():
    """x0 = floor(-1 / S); deployed: one less where 1 / S is whole."""
    x = torch.randint(-300, 300, (4, 50), dtype=torch.int32)
    for scale, x0, deployed in ((0.25, -4, -5), (0.3, -4, -4), (3.0, -1, -1)):
        y = torch.ops.effvit.shiftmax(x, x0=x0)
        assert torch.equal(effvit.ops.shiftmax(x, scale), y)
        y = torch.ops.effvit.shiftmax(x, x0=deployed, n=16, half_bit=False)
        assert torch.equal(effvit.ops.shiftmax(x, scale, n=16, deployed=True), y)


def test_a_small_n_keeps_sums_near_one():
    """The reciprocal keeps few bits of a large sum: the specification's example."""
    x = (torch.randn(8, 197, generator=torch.Generator().manual_seed(0)) * 0.15 / 0.004).to(torch.int32)
    sums = {n: effvit.ops.shiftmax(x, 0.004, n=n, bits=16, out_dtype=torch.int16).long().sum(-1).double().mean() / 2**15
            for n in (10, 15)}  # fmt: skip
    assert sums[10] > 0.95 and sums[15] < 0.8


@pytest.mark.parametrize(("scale", "n"), [(1 / 65536, 15), (1 / 32768, 16), (1 / 256, 23)])
def test_bounds_of_the_scale(scale, n):
    x = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"effvit::shiftmax: scale must be such that x0 fits.* with n = {n}"):
        effvit.ops.shiftmax(x, scale, n=n)
    effvit.ops.shiftmax(x, scale * 1.01, n=n)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be"):
            effvit.ops.shiftmax(x, wrong)


def test_scale_or_x0():
    x = torch.randint(-300, 300, (4, 50), dtype=torch.int32)
    for function in (effvit.shiftmax, effvit.shift_gelu):
        assert torch.equal(function(x, x0=-20), getattr(torch.ops.effvit, function.__name__)(x, x0=-20))
        for wrong in ({}, {"scale": 0.1, "x0": -20}):
            with pytest.raises(ValueError, match="scale must be given, or x0 in its place"):
                function(x, **wrong)
