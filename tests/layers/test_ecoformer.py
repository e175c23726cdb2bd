"""EcoFormerAttention against plain formulas in float64, gradients included, and the fitting of its hash functions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from effvit._accuracy import assert_close_to_truth
from effvit.layers import EcoFormerAttention
from effvit.layers.ecoformer import code_attention, similarities


def layer(own_value=True, **options):
    torch.manual_seed(1)
    return EcoFormerAttention(24, 3, True, bits=6, anchors=7, top=4, own_value=own_value, steps=20, **options)


def hash_formula(x, anchors, mean, a):
    """One token and head at a time; before the sign."""
    (b, n, h, _), out = x.shape, []
    for i in range(b):
        for j in range(h):
            d = torch.stack([(x[i, t, j] - anchors[j]).square().sum(-1) for t in range(n)])
            out.append((torch.exp(-d / (2 * d.mean())) - mean[j]) @ a[j].T)
    return torch.stack(out).view(b, h, n, -1).transpose(1, 2)


def attention_formula(codes, v, own_value):
    """Every pair of tokens: similarity q k + bits + 1; the authors' own v, or all of them."""
    bits = codes.shape[-1]
    products = torch.einsum("bihf,bjhf->bhij", codes, codes)
    weights = products + bits + 1
    top = products @ v.transpose(1, 2) + (bits + 1) * v.transpose(1, 2) if own_value else weights @ v.transpose(1, 2)
    return (top / weights.sum(-1, keepdim=True)).transpose(1, 2)


@pytest.mark.parametrize("own_value", [True, False])
def test_attention_is_the_formula(own_value):
    m, x = layer(own_value), torch.randn(2, 13, 24)
    y = m(x).detach()  # the first call fits
    assert m.fitted and torch.equal(m(x).detach(), y)

    def formula(dtype):
        w = {name: t.detach().to(dtype) for name, t in m.state_dict().items()}
        qk = F.linear(x.to(dtype), w["to_qk.weight"], w["to_qk.bias"]).view(2, 13, 3, 8)
        v = F.linear(x.to(dtype), w["to_v.weight"], w["to_v.bias"]).view(2, 13, 3, 8)
        qk = qk / qk.square().sum(-1, keepdim=True).sqrt()
        codes = 2 * (hash_formula(qk, w["anchors"], w["mean"], w["projection"]) >= 0).to(dtype) - 1
        return F.linear(attention_formula(codes, v, own_value).reshape(2, 13, 24), w["proj.weight"], w["proj.bias"])

    assert_close_to_truth(y, formula(torch.float64), formula(torch.float32))


def test_hash_is_the_formula_and_its_bits():
    m = layer()
    x = F.normalize(torch.randn(2, 11, 3, 8), dim=-1)
    m.fit(x)
    truth = hash_formula(*(t.double() for t in (x, m.anchors, m.mean, m.projection)))
    codes = torch.where(truth >= 0, 1.0, -1.0)
    assert torch.equal(m.codes(x).double(), codes)
    assert np.array_equal(m.bits(x).numpy(), np.packbits(codes.numpy() > 0, axis=-1, bitorder="little"))


@pytest.mark.parametrize("own_value", [True, False])
def test_code_attention_gradients(own_value):
    q = torch.where(torch.randn(2, 9, 3, 6) > 0, 1.0, -1.0)
    v, g = torch.randn(2, 9, 3, 8, requires_grad=True), torch.randn(2, 9, 3, 8)
    q.requires_grad_()
    found = torch.autograd.grad(code_attention(q, q, v, own_value), (q, v), g)
    leaves = [t.detach().double().requires_grad_() for t in (q, v)]
    expected = torch.autograd.grad(attention_formula(*leaves, own_value), leaves, g.double())
    for f, e in zip(found, expected, strict=True):
        assert_close_to_truth(f, e, e.float(), magnitude=e.abs().max().expand(e.shape) * 4)


def test_gradient_passes_the_sign_where_it_is_near():
    m = layer()
    x = F.normalize(torch.randn(2, 11, 3, 8), dim=-1)
    m.fit(x)
    m.double()
    with torch.no_grad():
        m.projection.mul_(3)
    x = x.double().requires_grad_()
    g = torch.randn(2, 11, 3, 6).double()
    y = hash_formula(x, m.anchors, m.mean, m.projection)
    assert 0.1 < (y.abs() <= 1).double().mean() < 0.95
    (expected,) = torch.autograd.grad(y, x, g * (y.abs() <= 1))
    (found,) = torch.autograd.grad(m.codes(x), x, g)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_similarities():
    x = F.normalize(torch.randn(2, 8, 1, 4), dim=-1)
    s = similarities(x, 3)[:, 0]
    products = (x[:, :, 0] @ x[:, :, 0].mT).numpy()
    for b, i in np.ndindex(2, 8):
        order = np.argsort(products[b, i])
        assert set(np.flatnonzero(s[b, i].numpy() == -1)) == set(order[:3])
        assert set(np.flatnonzero(s[b, i].numpy() == 1)) == set(order[-3:])


def test_fitting_lowers_every_loss_and_brings_similar_tokens_together():
    """Tokens in clusters: after fitting, codes within a cluster agree more than with random projections."""
    torch.manual_seed(0)
    m = EcoFormerAttention(16, 1, bits=8, anchors=16, top=8, steps=200, lr=0.05)
    centres = torch.randn(4, 16)
    x = F.normalize(centres.repeat_interleave(8, 0) + 0.3 * torch.randn(32, 16), dim=-1).view(1, 32, 1, 16)

    def score():
        codes = m.codes(x)[0, :, 0]
        return float((similarities(x, 8)[0, 0] * (codes @ codes.T)).sum())

    torch.manual_seed(1)
    m.steps = 0
    m.fit(x)
    random = score()
    torch.manual_seed(1)  # the same anchors
    m.steps = 200
    losses = m.fit(x)
    assert (losses[:, 1] <= losses[:, 0]).all() and (losses[:, 1] < losses[:, 0]).any()
    assert score() > random


def test_update_trains_and_round_trip():
    m, x, target = layer(), torch.randn(4, 13, 24), torch.randn(4, 13, 24)
    optimizer, losses = torch.optim.Adam(m.parameters(), lr=0.02), []
    for step in range(30):
        if step == 10:
            before = m.anchors.clone()
            m.update()
        loss = F.mse_loss(m(x), target)
        if step == 10:
            assert m.fitted and not torch.equal(m.anchors, before)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and m.to_qk.weight.grad.abs().max() > 0
    again = layer()
    again.load_state_dict(m.state_dict())
    assert torch.equal(again(x), m(x))
    with pytest.raises(ValueError, match=r"x must be \[B, L, H, K\] with L at least 7"):
        m.fit(torch.randn(1, 5, 3, 8))
