"""rbf_gram: the shared suite, and proof of its definition against torch.cdist and SOFT's own formula."""

import pytest
import torch

import effvit.ops
from effvit.testing.rbf_gram import SPEC, reference
from op_suite import OpSuite


class TestRbfGram(OpSuite):
    spec = SPEC


def _tokens(B, L, M, H, D):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(B, n, H, D, generator=generator, dtype=torch.float64) * D**-0.25 for n in (L, M))


def _by_cdist(q, k, gamma):
    """Distances without any expansion of the square."""
    mode = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(q.transpose(1, 2), k.transpose(1, 2), compute_mode=mode)
    return torch.exp(-gamma * distance**2)


@pytest.mark.parametrize("gamma", [0.5, 0.03, 2.5])
def test_reference_is_cdist(gamma):
    q, k = _tokens(2, 30, 11, 3, 17)
    torch.testing.assert_close(reference(q, k, gamma=gamma), _by_cdist(q, k, gamma), rtol=1e-12, atol=1e-14)


def test_gradients_are_those_of_cdist():
    q, k = (t.requires_grad_() for t in _tokens(2, 20, 9, 2, 8))
    g = torch.randn(2, 2, 20, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad(reference(q, k, gamma=0.7), [q, k], g)
    expected = torch.autograd.grad(_by_cdist(q, k, 0.7), [q, k], g)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_definition_is_softs_formula():
    """The Gaussian kernel as SOFT writes it: q divided by d^(1/4), three products with matrices of ones."""
    q, k = _tokens(1, 12, 12, 2, 16)
    a, b = q.transpose(1, 2), k.transpose(1, 2).mT
    a2 = (a**2) @ torch.ones(16, 12, dtype=torch.float64)
    b2 = torch.ones(12, 16, dtype=torch.float64) @ (b**2)
    torch.testing.assert_close(reference(q, k), torch.exp(-0.5 * (a2 + b2 - 2 * (a @ b))), rtol=1e-12, atol=1e-14)


def test_gram_of_a_set_is_a_kernel_matrix():
    """Symmetric bit by bit, ones on the diagonal up to the rounding of the norms, positive semidefinite."""
    x = torch.randn(2, 49, 3, 64, generator=torch.Generator().manual_seed(3)) * 64**-0.25
    k = effvit.ops.rbf_gram(x, x)
    assert torch.equal(k, k.mT)
    assert (k <= 1).all() and (1 - k.diagonal(dim1=-2, dim2=-1) < 1e-5).all()
    assert torch.linalg.eigvalsh(k.double()).min() > -1e-5


def test_distance_is_never_negative():
    """Points that coincide far from the origin: rounding of the norms must not give more than 1."""
    x = torch.randn(1, 64, 1, 32, generator=torch.Generator().manual_seed(4)) + 50
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert (effvit.ops.rbf_gram(x.to(dtype), x.to(dtype)) <= 1).all()


def test_nan_and_overflow_stay_where_they_are():
    q, k = (t.float() for t in _tokens(1, 7, 5, 2, 8))
    clean = effvit.ops.rbf_gram(q, k)
    k[0, 3, 1, 2] = float("nan")
    q[0, 2, 0, 1] = 1e30  # the norm overflows
    out = effvit.ops.rbf_gram(q, k)
    touched = torch.zeros_like(out, dtype=torch.bool)
    touched[0, 1, :, 3] = touched[0, 0, 2, :] = True
    assert out[0, 1, :, 3].isnan().all()
    assert torch.equal(out[~touched], clean[~touched])
