"""Pow2Linear, MatAdd and ShiftAddAttention against plain formulas in float64, gradients included."""

import math

import pytest
import torch
import torch.nn.functional as F

from effvit._accuracy import assert_close_to_truth
from effvit.layers import MatAdd, Pow2Linear, ShiftAddAttention


def powers(w, bits, per_channel):
    """One weight at a time: the nearest power in the exponent, of those that the bits can hold."""
    span, out = 2 ** (bits - 1) - 2, torch.zeros(w.shape, dtype=torch.float64)
    for n, row in enumerate(w.tolist()):
        largest = max(abs(v) for v in row)
        top = round(math.log2(largest)) if per_channel and largest else 0
        for k, v in enumerate(row):
            if v and (p := round(math.log2(abs(v)))) >= top - span - 1:
                out[n, k] = math.copysign(2.0 ** min(max(p, top - span), top), v)
    return out


@pytest.mark.parametrize("bits, per_channel", [(2, True), (4, True), (5, True), (5, False)])
def test_weights_and_gradients(bits, per_channel):
    m, x, g = Pow2Linear(30, 12, bits=bits, per_channel=per_channel), torch.randn(2, 5, 30), torch.randn(2, 5, 12)
    x.requires_grad_()
    w, xd, gd = powers(m.weight, bits, per_channel), x.detach().double(), g.double()
    y = m(x)
    truth = F.linear(xd, w, m.bias.detach().double())
    assert torch.equal(m.powers().detach().double(), w)
    assert_close_to_truth(y, truth, F.linear(x, w.float(), m.bias).detach())
    found = torch.autograd.grad(y, (x, m.weight, m.bias), g)
    expected = gd @ w, gd.flatten(0, 1).T @ xd.flatten(0, 1), gd.sum((0, 1))  # the weight's is straight through
    for f, e in zip(found, expected, strict=True):
        assert_close_to_truth(f, e, e.float(), magnitude=e.abs().max().expand(e.shape) * 4)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_deployed_on_int8(bits):
    """x rounded to int8 by absmax / 127 of a token, in NumPy's arithmetic; the rest is exact."""
    m, x = Pow2Linear(40, 12, bits=bits), torch.randn(2, 5, 40)
    scale = x.abs().amax(-1, keepdim=True) / 127
    q = (x / scale).round().clamp(-127, 127)
    w = powers(m.weight, bits, True)
    y = m.deployed()(x)
    truth = F.linear(q.double(), w) * scale.double() + m.bias.detach().double()
    assert_close_to_truth(y, truth, (F.linear(q, w.float()) * scale + m.bias).detach())
    again = Pow2Linear(40, 12, bits=bits).deployed()
    again.load_state_dict(m.deployed().state_dict())
    assert torch.equal(again(x), y)


def test_deployed_in_fixed_point():
    """MatShift: floor(x_int >> s), term by term."""
    m, x = Pow2Linear(24, 10, bits=5, per_channel=False), torch.randn(6, 24)
    q = torch.round(x.double() * 2**16).long()
    w = powers(m.weight, 5, False)
    sums = torch.zeros(6, 10, dtype=torch.int64)
    for n in range(10):
        for k in range(24):
            if w[n, k] != 0:
                s = -round(math.log2(abs(w[n, k])))
                sums[:, n] += int(torch.sign(w[n, k])) * (q[:, k] >> s)
    truth = sums.double() * 2.0**-16 + m.bias.detach().double()
    assert_close_to_truth(m.deployed("fixed")(x), truth, (sums.float() * 2.0**-16 + m.bias).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form, bits", [("int8", 4), ("int8", 5), ("fixed", 5)])
def test_deployed_in_other_dtypes(form, bits, dtype):
    """The scale stays in float32; else as in float32, of the input and the bias that the dtype holds."""
    layer, x = Pow2Linear(40, 12, bits=bits).deployed(form), torch.randn(2, 5, 40).to(dtype)
    with torch.no_grad():
        layer.bias.copy_(layer.bias.to(dtype))
        expected = layer(x.float())
        y = layer.to(dtype)(x)
    assert y.dtype == dtype and layer.scale.dtype == torch.float32
    torch.testing.assert_close(y, expected.to(dtype))


def test_mat_add():
    mask, x = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 7, 4, requires_grad=True)
    mask.requires_grad_()
    y, g = MatAdd()(mask, x), torch.randn(2, 3, 5, 4)
    expected = torch.stack([torch.where(mask[..., i, :, None] > 0, x, 0).sum(-2) for i in range(5)], -2)
    torch.testing.assert_close(y, expected)
    dmask, dx = torch.autograd.grad(y, (mask, x), g)
    torch.testing.assert_close(dx, (mask > 0).float().mT @ g)
    torch.testing.assert_close(dmask, (g @ x.mT) * ((mask >= 0) & (mask <= 1)))
    q = torch.randint(-(2**31), 2**31, (7, 4)).to(torch.int32)
    exact = torch.stack([torch.where(mask[0, 0, i, :, None] > 0, q.long(), 0).sum(0) for i in range(5)])
    assert torch.equal(MatAdd()(mask[0, 0], q), exact.clamp(-(2**31), 2**31 - 1).int())


def attention_formula(m, x, dtype):
    x = x.to(dtype)
    w = {name: p.detach().to(dtype) for name, p in m.named_parameters()}
    b, n, c = x.shape
    qkv = F.linear(x, w["qkv.weight"], w["qkv.bias"]).view(b, n, 3, m.num_heads, -1)
    q, k, v = qkv.unbind(2)  # [B, N, h, d]
    q, k = (t / t.square().sum(-1, keepdim=True).sqrt() for t in (q, k))
    q, k = (t > (t.mean() if m.mean == "tensor" else t.mean((2, 3), keepdim=True)) for t in (q, k))
    out, taps = torch.zeros_like(v), w["dconv.weight"].shape[2]
    for t in range(n):
        for s in range(n):
            shared = (q[:, t] & k[:, s]).sum(-1, keepdim=True).to(dtype)
            out[:, t] += shared * v[:, s] / math.pi
    out = out + v / 2
    out = out / out.square().sum(-1, keepdim=True).sqrt()
    for t in range(n):
        for i in range(taps):
            if 0 <= (s := t + i - taps // 2) < n:
                out[:, t] += w["dconv.weight"][:, 0, i, 0, None] * v[:, s]
    return F.linear(out.reshape(b, n, c), w["proj.weight"], w["proj.bias"])


@pytest.mark.parametrize("mean", ["tensor", "token"])
def test_attention_is_the_formula(mean):
    m, x = ShiftAddAttention(24, 3, qkv_bias=True, mean=mean), torch.randn(2, 13, 24)
    truth = attention_formula(m, x, torch.float64)
    assert_close_to_truth(m(x).detach(), truth, attention_formula(m, x, torch.float32))
    if mean == "token":
        torch.testing.assert_close(m(x)[:1], m(x[:1]))


def test_attention_gradients():
    """Those of the same formula with q and k as clamp(q, 0, 1) plus a constant, in float64."""
    m, x, g = ShiftAddAttention(12, 2).double(), torch.randn(2, 7, 12).double(), torch.randn(2, 7, 12).double()
    found = torch.autograd.grad(m(x), list(m.parameters()), g)

    def binary(t):
        t = t / t.norm(dim=-1, keepdim=True)
        clipped = t.clamp(0, 1)
        return (t > t.mean()).double().detach() - clipped.detach() + clipped

    q, k, v = m.qkv(x).view(2, 7, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
    y = 0.5 * v + binary(q) @ (binary(k).mT @ v) / math.pi
    y = y / y.norm(dim=-1, keepdim=True) + m.dconv(v)
    expected = torch.autograd.grad(m.proj(y.transpose(1, 2).reshape(2, 7, 12)), list(m.parameters()), g)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-12)


def test_attention_trains():
    m, x, y = ShiftAddAttention(16, 2, shift_projections=True), torch.randn(4, 9, 16), torch.randn(4, 9, 16)
    optimizer, losses = torch.optim.Adam(m.parameters(), lr=0.02), []
    for _ in range(30):
        loss = F.mse_loss(m(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
