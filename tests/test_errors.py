"""Tests of the assertions themselves: each must fail on a planted error, and pass where it should."""

import pytest
import torch

from effvit.testing import (
    assert_bitwise_equal,
    assert_close_to_truth,
    assert_same_layout,
    coarsest_eps,
    measure,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _case(dtype, *shape, seed=0):
    """truth, its rounding to dtype, and a yardstick that is off by a few eps."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(*shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64) * torch.finfo(dtype).eps
    return truth, truth.to(dtype), (truth * (1 + noise)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_truth_passes(dtype):
    truth, result, yardstick = _case(dtype, 5, 7)
    assert assert_close_to_truth(result, truth, yardstick).ok
    assert assert_close_to_truth(result, truth).ok


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_fails_and_is_named(dtype):
    truth, result, yardstick = _case(dtype, 5, 7)
    result[3, 2] = result[3, 2] + 1
    message = r"out \(torch\.\w+, \[5, 7\]\): max error .*at \[3, 2\]: expected .*, actual "
    with pytest.raises(AssertionError, match=message) as raised:
        assert_close_to_truth(result, truth, yardstick, name="out")
    assert f"expected {float(truth[3, 2]):.9g}" in str(raised.value)
    assert f"actual {float(result[3, 2]):.9g}" in str(raised.value)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_fails_even_beside_a_bad_yardstick(bad):
    truth, result, yardstick = _case(torch.float32, 5, 7)
    result[0, 6] = bad
    yardstick[0, 6] = bad
    with pytest.raises(AssertionError, match=r"1 of 35 values are not finite; at \[0, 6\]"):
        assert_close_to_truth(result, truth, yardstick)
    with pytest.raises(AssertionError, match="35 of 35 values are not finite"):
        assert_close_to_truth(torch.full_like(result, bad), truth)


def test_yardstick_that_is_not_finite_allows_nothing():
    truth, result, yardstick = _case(torch.float32, 5, 7)
    wrong = result.clone()
    wrong[1, 1] += 0.01
    for bad in (torch.nan, torch.inf):
        yardstick[2, 2] = bad
        assert_close_to_truth(result, truth, yardstick)
        with pytest.raises(AssertionError, match=r"at \[1, 1\]"):
            assert_close_to_truth(wrong, truth, yardstick)


def test_allowance_is_twice_the_yardstick_and_no_more():
    truth = torch.ones(64, dtype=torch.float64)
    yardstick = torch.full((64,), 1.001)
    assert_close_to_truth(torch.full((64,), 1.0019), truth, yardstick)
    with pytest.raises(AssertionError, match="max error 0.0021"):
        assert_close_to_truth(torch.full((64,), 1.0021), truth, yardstick)


def test_a_function_is_asked_for_yardsticks_where_they_matter():
    truth, asked = torch.ones(64, dtype=torch.float64), []

    def yardstick():
        asked.append(True)
        return torch.full((64,), 1.001)

    assert_close_to_truth(torch.ones(64), truth, yardstick)
    assert not asked
    assert_close_to_truth(torch.full((64,), 1.0019), truth, yardstick)
    with pytest.raises(AssertionError, match="max error 0.0021"):
        assert_close_to_truth(torch.full((64,), 1.0021), truth, yardstick)
    assert len(asked) == 2


def test_many_small_errors_fail_by_the_norm():
    """Each element is within the largest error of the yardstick; all of them together are not."""
    truth = torch.ones(1000, dtype=torch.float64)
    yardstick = torch.ones(1000)
    yardstick[0] = 1.001
    result = torch.full((1000,), 1.0015)
    report = measure(result, truth, yardstick)
    assert report.max_error <= report.max_allowed and report.norm_error > report.norm_allowed and not report.ok
    with pytest.raises(AssertionError, match="norm of the error"):
        assert_close_to_truth(result, truth, yardstick)


def test_small_row_beside_a_large_one_is_measured_at_its_own_scale():
    truth = torch.cat((torch.full((1, 8), 1000.0), torch.full((1, 8), 0.01))).double()
    result = truth.float()
    assert_close_to_truth(result, truth)
    result[1, 3] *= 1.001
    with pytest.raises(AssertionError, match=r"at \[1, 3\]"):
        assert_close_to_truth(result, truth)


def test_magnitude_excuses_cancellation_only_where_it_says_so():
    truth = torch.zeros(2, dtype=torch.float64)
    result = torch.tensor([1e-6, 0.0])
    assert_close_to_truth(result, truth, magnitude=torch.tensor([10.0, 10.0]))
    with pytest.raises(AssertionError, match=r"at \[0\]"):
        assert_close_to_truth(result, truth, magnitude=torch.tensor([0.1, 10.0]))


def test_zero_magnitude_demands_exact_zero():
    truth = torch.zeros(3, dtype=torch.float64)
    assert_close_to_truth(torch.zeros(3), truth)
    with pytest.raises(AssertionError, match=r"at \[1\]"):
        assert_close_to_truth(torch.tensor([0.0, 1e-30, 0.0]), truth)


def test_overflow_must_be_the_right_infinity():
    truth = torch.tensor([1e6, -1e6, 1.0], dtype=torch.float64)
    assert_close_to_truth(torch.tensor([torch.inf, -torch.inf, 1.0], dtype=torch.float16), truth)
    for wrong in ([torch.inf, torch.inf, 1.0], [torch.nan, -torch.inf, 1.0], [65504.0, -torch.inf, 1.0]):
        with pytest.raises(AssertionError, match="must be infinite"):
            assert_close_to_truth(torch.tensor(wrong, dtype=torch.float16), truth)


def test_wrong_shape_and_kind_fail():
    truth, result, yardstick = _case(torch.float32, 5, 7)
    with pytest.raises(AssertionError, match=r"out: shape must be \[5, 7\], got \[7, 5\]"):
        assert_close_to_truth(result.T, truth, yardstick, name="out")
    with pytest.raises(AssertionError, match=r"shape must be \[5, 7\], got \[5, 1\]"):
        assert_close_to_truth(result[:, :1], truth)
    with pytest.raises(AssertionError, match="dtype must be floating point"):
        assert_close_to_truth(result.int(), truth)
    with pytest.raises(AssertionError, match="must be a tensor, got NoneType"):
        assert_close_to_truth(None, truth)


def test_senseless_questions_are_errors():
    truth, result, yardstick = _case(torch.float32, 5, 7)
    with pytest.raises(ValueError, match="truth64 must be float64"):
        assert_close_to_truth(result, truth.float())
    with pytest.raises(ValueError, match="truth64 must be finite"):
        assert_close_to_truth(result, truth * torch.nan)
    with pytest.raises(ValueError, match="yardstick must be"):
        assert_close_to_truth(result, truth, yardstick[0])
    with pytest.raises(ValueError, match="magnitude must be"):
        assert_close_to_truth(result, truth, magnitude=truth - 100)


def test_empty_passes():
    assert assert_close_to_truth(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.float64)).ok
    assert_bitwise_equal(torch.zeros(0), torch.zeros(0))


def test_coarsest_eps():
    tensors = (torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16), None, torch.zeros(1, dtype=torch.int64), 3)
    assert coarsest_eps(*tensors) == torch.finfo(torch.bfloat16).eps


def test_bitwise_equal_fails_on_one_ulp_dtype_shape_and_nan():
    a = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert_bitwise_equal(a, a.clone())
    b = a.clone()
    b[2, 1] = torch.nextafter(b[2, 1], torch.tensor(9.0))
    with pytest.raises(AssertionError, match=r"out: 1 of 20 values differ; first at \[2, 1\]: expected .* actual"):
        assert_bitwise_equal(b, a, name="out")
    with pytest.raises(AssertionError, match="must be"):
        assert_bitwise_equal(a.double(), a)
    with pytest.raises(AssertionError, match="must be"):
        assert_bitwise_equal(a[:1], a)
    b[2, 1] = torch.nan
    with pytest.raises(AssertionError, match="differ"):
        assert_bitwise_equal(b, b.clone())


def test_same_layout_fails_on_dtype_shape_and_strides():
    a = torch.zeros(4, 5)
    assert_same_layout(a, torch.ones(4, 5))
    assert_same_layout(torch.zeros(1, 5).expand(1, 5), torch.zeros(5, 1).T)
    for other in (a.double(), torch.zeros(5, 4), torch.zeros(5, 4).T):
        with pytest.raises(AssertionError, match="must have"):
            assert_same_layout(other, a)
