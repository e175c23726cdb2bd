"""The error rule: what it accepts whatever the size of the numbers, and what it refuses."""

import pytest
import torch

from effvit._accuracy import assert_close_to_truth
from effvit.testing import FLOAT_DTYPES

SIZES = [10.0**e for e in range(-30, 4)]  # for float16 from below its smallest subnormal number on


def _truth(size):
    return torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * size


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_the_rounded_truth_is_right(dtype):
    """Nothing of the dtype is closer, so no yardstick is needed."""
    for size in SIZES:
        truth = _truth(size)
        assert_close_to_truth(truth.to(dtype), truth, magnitude=truth.abs(), name=f"size {size:g}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_wrong_number_is_refused(dtype):
    """By eight spacings of the dtype, in one place."""
    finfo = torch.finfo(dtype)
    for size in SIZES:
        if size < finfo.tiny:
            continue
        truth = _truth(size)
        wrong = truth.to(dtype).double()
        wrong[7] += 8 * finfo.eps * truth[7].abs().clamp(min=finfo.tiny)
        with pytest.raises(AssertionError, match="max error"):
            assert_close_to_truth(wrong.to(dtype), truth, magnitude=truth.abs())


def test_subnormal_gradients_are_not_lost():
    """Zeros in place of float16's subnormal numbers are wrong, though a thousandth of them would not be missed."""
    truth = _truth(1e-5)
    with pytest.raises(AssertionError, match="max error"):
        assert_close_to_truth(torch.zeros(200, dtype=torch.float16), truth, magnitude=truth.abs())
