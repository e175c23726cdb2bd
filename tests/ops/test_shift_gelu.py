"""shift_gelu: the shared suite, and the same bits as int64 NumPy on every backend."""

import int_oracle
import pytest
import torch
import torch.nn.functional as F
from integer_suite import IntegerSuite, numpy_dtype

import effvit
from effvit.testing.shift_gelu import SPEC


class TestShiftGelu(IntegerSuite):
    spec = SPEC

    def oracle(self, args, kwargs):
        options = self.spec.declared.complete(kwargs)
        dtype = numpy_dtype(options.pop("out_dtype"))
        return int_oracle.shift_gelu(args[0].numpy(), **options, dtype=dtype)


def test_public_function():
    x = torch.randint(-100, 100, (4, 500), dtype=torch.int32)
    scale = 0.05
    y = effvit.ops.shift_gelu(x, scale)
    assert y.dtype == torch.int32
    expected = F.gelu(x.double() * scale)
    assert (y.double() * scale / 128 - expected).abs().max() < 0.25  # the sigmoid is off by 0.05
    q = effvit.ops.shift_gelu(x, scale, out_scale=0.04)
    assert q.dtype == torch.int8
    assert torch.equal(q, (y.double() * scale / 128 / 0.04).round().clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize("bits, error", [("8", TypeError), (-2000, ValueError), (50, ValueError)])
def test_bits_are_checked_before_they_are_used(bits, error):
    x = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(error, match="effvit::shift_gelu: bits must be "):
        effvit.ops.shift_gelu(x, 0.05, out_scale=0.1, bits=bits)


def test_rows_below_0():
    """The authors' formula shifts by more than n where all of a row is far below 0, where gelu is 0."""
    x = torch.full((1, 4), -200, dtype=torch.int32)
    assert effvit.ops.shift_gelu(x, 0.05).abs().max() == 0
    assert effvit.ops.shift_gelu(x, 0.05, safe_max=False).max() < -1000


@pytest.mark.parametrize("n", [10, 23])
def test_bounds_of_the_scale(n):
    x = torch.zeros(2, 3, dtype=torch.int32)
    most = ((2**31 - 1) >> n) * 1.702
    with pytest.raises(ValueError, match="effvit::shift_gelu: scale must be such that x0 fits"):
        effvit.ops.shift_gelu(x, 0.9999 / most, n=n)
    effvit.ops.shift_gelu(x, 1.0001 / most, n=n)
    for wrong in (1e-14, 1e12):
        with pytest.raises(ValueError, match="effvit::shift_gelu: out_scale must be such that"):
            effvit.ops.shift_gelu(x, 0.05, out_scale=wrong)
