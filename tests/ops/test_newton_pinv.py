"""newton_pinv: the shared suite, and proof of its definition against torch.linalg and SOFT's unrolled iteration."""

import pytest
import torch

import effvit.ops
from effvit.reference import rbf_gram
from effvit.testing.newton_pinv import SPEC, gram, reference
from op_suite import OpSuite


class TestNewtonPinv(OpSuite):
    spec = SPEC


def _gram(m, *, B=2, H=3, seed=1, **options):
    return gram(B, H, m, torch.Generator().manual_seed(seed), **options)


def _softs_iteration(mat, max_iter=20):
    """SOFT's newton_inv in its own words: P with 1e-2 on the diagonal, alpha from the row sums, 20 times 2V - VPV."""
    row_sum = torch.max(torch.sum(mat, dim=-1), dim=-1)[0]
    alpha = 1.8 / row_sum**2
    P = mat + 1e-2 * torch.eye(mat.shape[-1], dtype=mat.dtype)
    V = alpha[..., None, None] * P
    for _ in range(max_iter):
        V = 2 * V - V @ P @ V
    return V


@pytest.mark.parametrize("m", [1, 2, 17, 49])
def test_reference_is_the_inverse(m):
    a = _gram(m)
    expected = torch.linalg.inv(a + 0.01 * torch.eye(m, dtype=a.dtype))
    torch.testing.assert_close(reference(a), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        reference(a, ridge=0.3, step=0.9), torch.linalg.inv(a + 0.3 * torch.eye(m, dtype=a.dtype))
    )


def test_reference_is_the_pseudo_inverse_without_ridge():
    """Every token twice, so half of the spectrum is 0: V starts as a multiple of P and never leaves its range."""
    x = torch.randn(1, 8, 2, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64).repeat(1, 2, 1, 1)
    a = rbf_gram(x, x, gamma=0.05)
    result = reference(a, ridge=0.0)
    torch.testing.assert_close(result, torch.linalg.pinv(a, rtol=1e-10), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("iterations", [0, 1, 3, 20])
@pytest.mark.parametrize("spread", [0.05, 0.35, 1.0])
def test_reference_is_softs_iteration(spread, iterations):
    a = _gram(49, spread=spread)
    result = reference(a, iterations=iterations)
    torch.testing.assert_close(result, _softs_iteration(a, iterations), rtol=1e-9, atol=1e-9)


def test_small_eigenvalues_are_damped():
    """The docstring's formula: (1 - (1 - alpha s^2)^(2^n)) / s for every eigenvalue s of P."""
    a = torch.diag_embed(torch.logspace(0, -5, 9, dtype=torch.float64))[None, None]
    s = a.diagonal(dim1=-2, dim2=-1)
    for n in (0, 4, 20):
        expected = (1 - (1 - 1.8 * s**2) ** (2**n)) / s
        result = reference(a, iterations=n, ridge=0.0).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9)


def test_gradient_is_that_of_the_inverse():
    a = _gram(20).requires_grad_()
    g = torch.randn(a.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (expected,) = torch.autograd.grad(torch.linalg.inv(a + 0.01 * torch.eye(20, dtype=a.dtype)), a, g)
    (found,) = torch.autograd.grad(reference(a), a, g)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_gradient_of_the_steps_is_the_same_where_they_converge():
    a = _gram(20).requires_grad_()
    g = torch.randn(a.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (unrolled,) = torch.autograd.grad(_softs_iteration(a), a, g)
    (found,) = torch.autograd.grad(reference(a), a, g)
    torch.testing.assert_close(found, unrolled, rtol=1e-7, atol=1e-7)


def test_gradient_is_the_closed_form_of_the_result():
    """Whether or not the iteration has converged."""
    a = _gram(20, spread=0.05).requires_grad_()
    v = reference(a, iterations=3)
    g = torch.randn(a.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (found,) = torch.autograd.grad(v, a, g)
    torch.testing.assert_close(found, -(v.detach().mT @ g @ v.detach().mT))


def test_reference_with_gradient_has_the_same_value():
    a = _gram(20).float()
    assert torch.equal(reference(a.requires_grad_()).detach(), reference(a.detach()))


def test_every_matrix_has_its_own_alpha():
    """Scaling one matrix of the batch changes no other."""
    a = _gram(9, B=1, H=4).float()
    b = a.clone()
    b[:, 2] *= 37
    one, two = effvit.ops.newton_pinv(a), effvit.ops.newton_pinv(b)
    for head in (0, 1, 3):
        assert torch.equal(one[:, head], two[:, head])
    assert not torch.equal(one[:, 2], two[:, 2])


def test_nan_stays_in_its_matrix():
    a = _gram(9, B=1, H=3).float()
    clean = effvit.ops.newton_pinv(a)
    a[0, 1, 4, 2] = float("nan")
    out = effvit.ops.newton_pinv(a)
    assert out[0, 1].isnan().all()
    assert torch.equal(out[0, ::2], clean[0, ::2])


def test_no_positive_row_sum_gives_nan():
    assert effvit.ops.newton_pinv(torch.zeros(1, 1, 3, 3)).isnan().all()


def test_autocast_leaves_the_dtype():
    a = _gram(9).float()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            result = effvit.ops.newton_pinv(a)
        assert result.dtype == torch.float32 and torch.equal(result, effvit.ops.newton_pinv(a))
