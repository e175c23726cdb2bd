"""BinaryLinear, its deployed form and BinaryAttention against plain formulas in float64, gradients included."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effvit._accuracy import assert_close_to_truth
from effvit.layers import BinaryAttention, BinaryLinear
from effvit.layers.binary import PackedBinaryLinear, binarise_softmax, softmax_threshold

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def plain(x, w, scale, bias, activation="none"):
    """By the papers: signs, the mean of |x|, a scale a channel; no straight-through estimator."""
    signs = [2 * (t >= 0).to(t.dtype) - 1 for t in (x, w)]
    y = torch.einsum("...k,nk->...n", *signs) * x.abs().mean(-1, keepdim=True) * scale
    return ACTIVATIONS[activation](y if bias is None else y + bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_formula(activation, bias):
    m, x = BinaryLinear(37, 22, bias, activation), torch.randn(2, 5, 37)
    with torch.no_grad():
        m.scale[3] = -m.scale[3]  # training may make one negative
        found = {"bits": m(x), "deployed": m.deployed()(x)}
    found["formula"] = m(x)
    args = [None if t is None else t.detach() for t in (x, m.weight, m.scale, m.bias)]
    truth = plain(*(None if t is None else t.double() for t in args), activation)
    for name, y in found.items():
        assert_close_to_truth(y, truth, plain(*args, activation), name=name)


def test_linear_gradients():
    """Straight through signs where |.| <= 1, the mean of |x| a constant: written out."""
    m, x, g = BinaryLinear(20, 9), torch.randn(6, 20) * 1.5, torch.randn(6, 9)
    with torch.no_grad():
        m.weight.mul_(6)  # some beyond 1
    x.requires_grad_()
    found = torch.autograd.grad(m(x), (x, m.weight, m.scale, m.bias), g)
    w, s, xd, gd = m.weight.detach().double(), m.scale.detach().double(), x.detach().double(), g.double()
    a = xd.abs().mean(1, keepdim=True)
    sx, sw = 2 * (xd >= 0).double() - 1, 2 * (w >= 0).double() - 1
    expected = (
        (gd * a * s) @ sw * (xd.abs() <= 1), (gd * a * s).T @ sx * (w.abs() <= 1), (gd * a * (sx @ sw.T)).sum(0),
        gd.sum(0),
    )  # fmt: skip
    for f, e in zip(found, expected, strict=True):
        assert_close_to_truth(f, e, e.float(), magnitude=e.abs().max().expand(e.shape) * 4)


def test_from_linear_and_dtypes():
    linear = nn.Linear(16, 8)
    m = BinaryLinear.from_linear(linear)
    assert m.weight is linear.weight and m.bias is linear.bias
    x = torch.randn(3, 16)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float16):
            y = m.to(dtype)(x.to(dtype))
            assert y.dtype == dtype and torch.isfinite(y).all()
    with pytest.raises(ValueError, match=r"BinaryLinear: x must be \[..., 16\], got \[3, 15\]"):
        m(torch.randn(3, 15))


def test_deployed_keeps_bits_only():
    d = BinaryLinear(64, 32).deployed()
    assert isinstance(d, PackedBinaryLinear) and d.weight.dtype == torch.uint8 and d.weight.numel() == 64 * 32 // 8
    again = PackedBinaryLinear(torch.zeros_like(d.weight), d.scale * 0, d.bias * 0, 64)
    again.load_state_dict(d.state_dict())
    x = torch.randn(4, 64)
    assert torch.equal(again(x), d(x))


def test_zeros():
    with torch.no_grad():
        m = BinaryLinear(16, 8)
        assert torch.allclose(m(torch.zeros(2, 16)), m.bias.expand(2, 8))


def test_softmax_threshold_is_the_best_of_all_subsets():
    p = torch.randn(12, 7, dtype=torch.float64).mul(2).softmax(-1)
    rounded = binarise_softmax(p)
    for row, ours in zip(p, rounded, strict=True):
        best = min(
            ((row - torch.where(mask, row[mask].mean(), 0.0)) ** 2).sum()
            for bits in itertools.product((False, True), repeat=7)
            if (mask := torch.tensor(bits)).any()
        )
        torch.testing.assert_close(((row - ours) ** 2).sum(), best)
    assert (softmax_threshold(p)[:, None] <= p.max(-1, keepdim=True).values).all()


def attention_formula(m, x, dtype):
    """The layer with float projections, token by token."""
    x = x.to(dtype)
    b, n, c = x.shape
    w = {name: p.detach().to(dtype) for name, p in m.named_parameters()}
    qkv = F.linear(x, w["qkv.weight"], w["qkv.bias"]).view(b, n, 3, m.num_heads, -1)
    out = torch.zeros(b, n, m.num_heads, m.head_dim, dtype=dtype)
    for i in range(b):
        for h in range(m.num_heads):
            q, k, v = qkv[i, :, :, h].unbind(1)
            signs = [2 * (t >= 0).to(dtype) - 1 for t in (q, k, v)]
            scores = signs[0] @ signs[1].T * q.abs().mean(1)[:, None] * k.abs().mean(1) * m.head_dim**-0.5
            p = scores.softmax(-1)
            for t in range(n):
                sums = [(j + 1, p[t].sort(descending=True).values[: j + 1].sum()) for j in range(n)]
                count = max(sums, key=lambda s: s[1] ** 2 / s[0])[0]
                on = p[t] >= p[t].sort(descending=True).values[count - 1]
                out[i, t, h] = p[t][on].mean() * (signs[2][on].sum(0)) * v.abs().mean(0)
    return F.linear(out.reshape(b, n, c), w["proj.weight"], w["proj.bias"])


def test_attention_is_the_formula():
    torch.manual_seed(3)
    m, x = BinaryAttention(24, 3, qkv_bias=True, binary_projections=False), torch.randn(2, 11, 24)
    truth = attention_formula(m, x, torch.float64)
    yardstick = attention_formula(m, x, torch.float32)
    with torch.no_grad():
        assert_close_to_truth(m(x), truth, yardstick, name="bits")
    assert_close_to_truth(m(x).detach(), truth, yardstick, name="formula")


def test_attention_trains():
    """One-bit projections: every parameter has a gradient, and a few steps lower the loss."""
    torch.manual_seed(0)
    m, x, y = BinaryAttention(16, 2), torch.randn(4, 9, 16), torch.randn(4, 9, 16)
    optimizer, losses = torch.optim.Adam(m.parameters(), lr=0.02), []
    for _ in range(60):
        loss = F.mse_loss(m(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in m.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
