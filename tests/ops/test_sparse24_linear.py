"""sparse24_linear: the shared suite, and nn.functional.linear."""

import torch

import effvit
from effvit.testing._sparse24 import sparse_weight
from effvit.testing.sparse24_linear import SPEC
from op_suite import OpSuite


class TestSparse24Linear(OpSuite):
    spec = SPEC


def test_is_a_linear_layer():
    w = sparse_weight(6, 12, torch.float32, torch.Generator().manual_seed(0), keep=2).requires_grad_()
    x, bias = torch.randn(2, 5, 12, requires_grad=True), torch.randn(6, requires_grad=True)
    grad = torch.randn(2, 5, 6)
    expected = torch.nn.functional.linear(x, w, bias)
    values, meta = effvit.sparse24_compress(w)
    found = effvit.sparse24_linear(x, values, meta, bias)
    torch.testing.assert_close(found, expected)
    e = torch.autograd.grad(expected, (x, w, bias), grad)
    f = torch.autograd.grad(found, (x, w, bias), grad)  # of w by way of the values
    for a, b in zip(f, (e[0], e[1] * (w != 0), e[2]), strict=True):
        torch.testing.assert_close(a, b)
