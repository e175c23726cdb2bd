"""fake_quantize_int8: the shared suite, quantize_int8, and torch's own fake quantisation."""

import pytest
import torch

import effvit
from effvit._accuracy import assert_bitwise_equal
from effvit.testing.fake_quantize_int8 import SPEC
from op_suite import OpSuite


class TestFakeQuantizeInt8(OpSuite):
    spec = SPEC


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("round", ["even", "away"])
def test_is_what_quantize_int8_keeps(round, given):
    x = 3 * torch.randn(4, 5, 65)
    scale = 0.02 * (1 + torch.rand(4, 5)) if given else None
    q, steps = effvit.quantize_int8(x, scale, round=round)
    assert_bitwise_equal(effvit.fake_quantize_int8(x, scale, round=round), q.float() * steps[..., None])


def test_is_torchs_own():
    """Forward, and the gradients of x and of a scale, which is a power of two: torch multiplies by its inverse."""
    x = torch.randn(50, 40) * 3
    scale = torch.tensor([2.0**-6])
    x = torch.where((x.abs() / scale - 127.25).abs() < 0.3, 0.0, x)  # where torch clips what rounds to 128
    g = torch.randn(50, 40)
    results = []
    for function in (
        lambda x, s: effvit.fake_quantize_int8(x, s),
        lambda x, s: torch._fake_quantize_learnable_per_tensor_affine(x, s, torch.zeros(1), -127, 127, 1.0),
    ):
        leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
        y = function(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, g)))
    (y, dx, ds), (expected, expected_dx, expected_ds) = results
    assert_bitwise_equal(y, expected)
    assert_bitwise_equal(dx, expected_dx)
    torch.testing.assert_close(ds, expected_ds, rtol=1e-4, atol=1e-2)  # sums of 2000 terms up to 127
    assert (dx == 0).any() and (dx != 0).any()


def test_rows_of_zeros_and_not_finite():
    x = torch.tensor([[0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0], [-2.0, 1.0]]).requires_grad_()
    y = effvit.fake_quantize_int8(x)
    assert y[0].eq(0).all() and y[1:3].isnan().all() and y[3, 0] == -2 and abs(y[3, 1] - 1) < 0.01
    y[0].sum().backward()
    assert x.grad[0].eq(1).all()
