"""sparse24_prune: the shared suite of results and of what PyTorch asks; its straight-through gradient by hand.

Derivatives of other modes are not compared with the definition's: the gradient is none of the forward's.
"""

import pytest
import torch

import effvit
from effvit.testing import assert_bitwise_equal
from effvit.testing.sparse24_prune import SPEC
from op_suite import ForwardSuite


class TestSparse24Prune(ForwardSuite):
    spec = SPEC


@pytest.mark.parametrize("algorithm", ["magnitude", "transposable"])
def test_is_the_formula(algorithm):
    w = torch.randn(8, 16).requires_grad_()
    mask = effvit.sparse24_mask(w, algorithm=algorithm)
    out = effvit.sparse24_prune(w, algorithm=algorithm, strength=0.5)
    assert_bitwise_equal(out, w.detach() * mask)
    grad = torch.randn(8, 16)
    (found,) = torch.autograd.grad(out, w, grad)
    torch.testing.assert_close(found, grad + 0.5 * ~mask * w.detach())
    assert_bitwise_equal(effvit.sparse24_prune(w, algorithm=algorithm, decay=1.0), w.detach())


def test_is_zero_where_masked_and_infinite_where_kept():
    w = torch.tensor([[float("inf"), 2.0, 1.0, -3.0]])
    assert effvit.sparse24_prune(w).tolist() == [[float("inf"), 0.0, 0.0, -3.0]]


def test_tangents_go_straight_through():
    w, t = torch.randn(4, 8), torch.randn(4, 8)
    out, moved = torch.func.jvp(effvit.sparse24_prune, (w,), (t,))
    assert_bitwise_equal(out, effvit.sparse24_prune(w))
    assert_bitwise_equal(moved, t)
