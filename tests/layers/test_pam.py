"""PAMLinear against sums of products that are added bit by bit in NumPy, gradients included."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from int_oracle import pam
from torch import nn

from effvit._accuracy import assert_close_to_truth
from effvit.layers import PAMLinear


def matmul(a, b):
    """a [M, K], b [K, N]: exact float32 products, summed in float64; and the sum of their sizes."""
    terms = pam(a.detach().numpy()[:, :, None], b.detach().numpy()[None]).astype(np.float64)
    return torch.from_numpy(terms.sum(1)), torch.from_numpy(np.abs(terms).sum(1))


def call():
    m, x, g = PAMLinear(30, 12), torch.randn(2, 9, 30), torch.randn(2, 9, 12)
    return m, x.requires_grad_(), g


def test_forward_and_the_derivative_that_mimics():
    m, x, g = call()
    rows, grads = x.detach().view(18, 30), g.view(18, 12)
    y = m(x)
    truth, size = matmul(rows, m.weight.T)
    bias = m.bias.detach().double()
    assert_close_to_truth(y.view(18, 12), truth + bias, magnitude=size + bias.abs())
    dx, dw, db = torch.autograd.grad(y, (x, m.weight, m.bias), g)
    for found, (t, s) in ((dx.view(18, 30), matmul(grads, m.weight)), (dw, matmul(grads.T, rows))):
        assert_close_to_truth(found, t, magnitude=s)
    assert_close_to_truth(db, grads.double().sum(0), grads.sum(0), magnitude=grads.double().abs().sum(0))


def test_the_exact_derivative():
    m, x, g = call()
    m.derivative = "exact"
    rows, grads = x.detach().view(18, 30), g.view(18, 12)
    dx, dw = torch.autograd.grad(m(x), (x, m.weight), g)

    def slope(a, b):
        """Of pam(a, b) in a: by a difference so small that it stays in the piece; exact."""
        u, v = (np.frexp(np.abs(t.astype(np.float64))) for t in (a, b))
        carry = (2 * u[0] - 1) + (2 * v[0] - 1) >= 1
        return np.sign(b) * np.exp2(v[1] - 1 + carry)

    a, b = (t.detach().numpy() for t in (rows, m.weight))
    a, b = a[:, None], b[None]  # [18, 12, 30]
    a, b = np.broadcast_arrays(a, b)
    g64 = grads.double().numpy()[..., None]
    for found, terms in ((dx.view(18, 30), (g64 * slope(a, b)).transpose(1, 0, 2)), (dw, g64 * slope(b, a))):
        size = torch.from_numpy(np.abs(terms).sum(0))
        assert_close_to_truth(found, torch.from_numpy(terms.sum(0)), magnitude=size)


def test_from_linear_and_dtypes():
    linear = nn.Linear(16, 8)
    m = PAMLinear.from_linear(linear)
    assert m.weight is linear.weight and m.state_dict().keys() == linear.state_dict().keys()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        y = m.to(dtype)(torch.randn(3, 16).to(dtype))
        assert y.dtype == dtype and torch.isfinite(y).all()
    with pytest.raises(ValueError, match=r"PAMLinear: x must be \[..., 16\], got \[3, 15\]"):
        m(torch.randn(3, 15))
    with pytest.raises(ValueError, match="derivative must be one of mimic, exact, got 'both'"):
        PAMLinear(3, 4, derivative="both")


@pytest.mark.parametrize("derivative", ["mimic", "exact"])
def test_trains_like_a_linear_layer(derivative):
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    target = torch.tanh(x @ torch.randn(8, 4))
    losses = {}
    for name, make in (("pam", lambda *a: PAMLinear(*a, derivative=derivative)), ("linear", nn.Linear)):
        torch.manual_seed(1)
        m = nn.Sequential(make(8, 32), nn.ReLU(), make(32, 4))
        optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
        for _ in range(150):
            loss = F.mse_loss(m(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["pam"] < max(2 * losses["linear"], 0.02)
