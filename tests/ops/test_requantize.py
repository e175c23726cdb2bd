"""requantize: the shared suite, and the same bits as int64 NumPy on every backend."""

from fractions import Fraction

import int_oracle
import pytest
import torch
from integer_suite import IntegerSuite, numpy_dtype

import effvit
from effvit.integer import multipliers
from effvit.ops._integer import fixed_point, fixed_point_of
from effvit.testing.requantize import SPEC


class TestRequantize(IntegerSuite):
    spec = SPEC

    def oracle(self, args, kwargs):
        options = self.spec.declared.complete(kwargs)
        dtype = numpy_dtype(options.pop("out_dtype"))
        return int_oracle.requantize(*(None if a is None else a.numpy() for a in args), **options, dtype=dtype)


def test_public_function():
    x = torch.randint(-30000, 30000, (4, 50), dtype=torch.int32)
    y = effvit.requantize(x, *multipliers(0.001, 0.25, x))
    assert torch.equal(y, (x.double() * (0.001 / 0.25)).round().clamp(-128, 127).to(torch.int8))
    scale, residual = 0.0005 + 0.001 * torch.rand(50), torch.randint(-300, 300, (4, 50), dtype=torch.int32)
    other = multipliers(0.02, 0.01, x)
    y = effvit.requantize(x, *multipliers(scale, 0.01, x), residual, *other, bits=16, out_dtype=torch.int16)
    expected = (x.double() * (scale.double() / 0.01)).round() + (residual.double() * 2).round()
    assert torch.equal(y, expected.to(torch.int16))


def test_ties_go_to_the_even_number():
    x = torch.tensor([[1, 3, 5, -1, -3, -5, 2, 257]], dtype=torch.int32)
    assert effvit.requantize(x, *multipliers(0.5, 1.0, x)).tolist() == [[0, 2, 2, 0, -2, -2, 1, 127]]


def test_multipliers():
    """The nearest fraction with a mantissa of 31 bits, the same from floats and from tensors."""
    ratios = [0.1, 1.0, 0.5, 3.7e-5, 12345.678, 1 - 2.0**-40, 2.0**-31, 2.0**30 - 1]
    m, c = fixed_point_of(torch.tensor(ratios, dtype=torch.float64))
    for i, ratio in enumerate(ratios):
        assert (int(m[i]), int(c[i])) == fixed_point(ratio)
        assert 2**30 <= m[i] < 2**31 and 1 <= c[i] <= 61
        assert abs(Fraction(int(m[i]), 1) / 2 ** int(c[i]) / Fraction(ratio) - 1) <= Fraction(1, 2**31)
    negative, shift = fixed_point_of(torch.tensor([-0.1], dtype=torch.float64))
    assert abs(int(negative)) - fixed_point(0.1)[0] in (0, -1) and int(shift) == fixed_point(0.1)[1]


@pytest.mark.parametrize("ratio", [0.0, 2.0**30, 2.0**-32, float("nan")])
def test_bounds_of_the_ratio(ratio):
    x = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="effvit::requantize: scale must be"):
        multipliers(torch.tensor([ratio], dtype=torch.float64), 1.0, x)
    with pytest.raises(
        ValueError, match=r"effvit::requantize: scale must be a number, \[1\] or \[C\] = \[3\], got \[2\]"
    ):
        multipliers(torch.ones(2), 1.0, x)
