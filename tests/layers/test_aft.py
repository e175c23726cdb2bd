"""effvit.layers.AFTFull, AFTLocal, AFTSimple and AFTConv against the paper's sums over all pairs of tokens."""

import copy
import functools

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_close_to_truth
from effvit.layers import AFTConv, AFTFull, AFTLocal, AFTSimple

H, W, DIM = 4, 5, 12
L = H * W


def mixed(m, x, w, order="forward"):
    """sigmoid(q) sum_j exp(k_j + w_ij) v_j / sum_j exp(k_j + w_ij), w [B or 1, L, L, C or 1]."""
    q, k, v = m.to_q(x), m.to_k(x), m.to_v(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    terms = k[:, None].to(wide) + w.to(wide)
    values = v[:, None].to(wide)
    if order == "reversed":
        terms, values = terms.flip(2), values.flip(2)
    weights = (terms - terms.amax(2, keepdim=True)).exp()
    mean = (weights * values).sum(2) / weights.sum(2)
    if order == "products":  # exp(w) exp(k), the largest of each taken off
        e, u = (k.to(wide) - k.to(wide).amax(1, keepdim=True)).exp(), w.to(wide)
        u = (u - u.amax(2, keepdim=True)).exp()
        mean = (u * (e * v.to(wide))[:, None]).sum(2) / (u * e[:, None]).sum(2)
    return m.proj((torch.sigmoid(q.to(wide)) * mean).to(q.dtype))


def full(m, x, order="forward"):
    n = x.shape[1]
    w = m.pos_bias[:n, :n] if m.factor_dim is None else (m.pos_query @ m.pos_key.mT)[:n, :n]
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    if m.window:
        w = torch.where(distance < m.window, w, torch.zeros_like(w))
    return mixed(m, x, w[None, :, :, None], order)


def simple(m, x, order="forward"):
    return mixed(m, x, torch.zeros(1, 1, 1, 1, dtype=x.dtype), order)


def conv(m, x, order="forward"):
    """w_ij of two tokens is the head's weight at their offset, 0 beyond the kernel."""
    y, z = torch.arange(L) // W, torch.arange(L) % W
    p = m.padding
    dy, dz = y[None] - y[:, None] + p, z[None] - z[:, None] + p
    inside = (dy >= 0) & (dy <= 2 * p) & (dz >= 0) & (dz <= 2 * p)
    weight = spread(m, "weight", (x.shape[0], *m.weight.shape))
    w = weight[:, :, dy.clamp(0, 2 * p), dz.clamp(0, 2 * p)] * inside  # [B, heads, L, L]
    if order == "products":  # the paper's equation: what differs from a bias of zero, and the sum of all
        q, k, v = m.to_q(x), m.to_k(x), m.to_v(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        e = (k.to(wide) - k.to(wide).amax(1, keepdim=True)).exp()
        u = w.to(wide).expm1().repeat_interleave(m.channels, 1).permute(0, 2, 3, 1)
        num, den = ((u * t[:, None]).sum(2) + t.sum(1, keepdim=True) for t in (e * v.to(wide), e))
        return m.proj((torch.sigmoid(q.to(wide)) * num / den).to(q.dtype))
    return mixed(m, x, w.repeat_interleave(m.channels, 1).permute(0, 2, 3, 1), order)


def forms(formula):
    return [functools.partial(formula, order=order) for order in ("reversed", "products")]


def on_map(m, x):
    return m(x, (H, W))


CASES = {
    "full": (lambda **f: AFTFull(DIM, L, factor_dim=None, **f), full, None),
    "full, low rank, shorter": (lambda **f: AFTFull(DIM, L + 3, 16, factor_dim=4, **f), full, None),
    "local": (lambda **f: AFTLocal(DIM, L, 4, bias=False, **f), full, None),
    "simple": (lambda **f: AFTSimple(DIM, 16, **f), simple, None),
    "conv": (lambda **f: AFTConv(DIM, 3, 3, **f), conv, on_map),
    "conv, wide": (lambda **f: AFTConv(DIM, 2, 11, 16, bias=False, **f), conv, on_map),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_like_the_formula(case, dtype):
    make, formula, call = CASES[case]
    m = randomise(make()).to(dtype)
    check(m, formula, tokens(2, L, DIM, dtype=dtype), also=forms(formula), call=call)


@pytest.mark.parametrize("case", ["full", "simple", "conv"])
def test_autocast(case):
    make, formula, call = CASES[case]
    check(randomise(make()), formula, tokens(2, L, DIM), also=forms(formula), call=call, autocast=torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
def test_the_rest(case):
    make, _, call = CASES[case]
    check_everything_else(randomise(make()), make, tokens(2, L, DIM), call)


def test_far_keys():
    """Keys of several hundred: the largest is taken off before any exponential. A gradient's error is then that of the
    logarithm of the sum in float32."""
    for make, formula, call in CASES.values():
        m, x = randomise(make()), tokens(1, L, DIM)
        with torch.no_grad():
            m.to_k.weight.mul_(300)
            truth = formula(copy.deepcopy(m).double(), x.double())
            yardsticks = [formula(m, x), formula(m, x, order="reversed")]
        x.requires_grad_()
        y = (call or (lambda m, x: m(x)))(m, x)
        magnitude = truth.abs().amax(-1, keepdim=True).expand_as(truth)
        assert_close_to_truth(y.detach(), truth, yardsticks, magnitude=magnitude)
        y.sum().backward()
        assert all(t.grad.isfinite().all() for t in (x, *m.parameters()))


def test_initialisation():
    m = AFTFull(DIM, 200)
    assert m.pos_query.shape == m.pos_key.shape == (200, 128)
    assert 0.009 < m.pos_query.std() < 0.011 and m.factor_dim == 128
    assert AFTLocal(DIM, 30, 3, factor_dim=None).pos_bias.shape == (30, 30)
    assert AFTConv(DIM, 4).weight.shape == (4, 11, 11)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"effvit::AFTLocal: x must be \[B, L, C\] with L up to 8, got \[1, 9, 12\]"):
        AFTLocal(DIM, 8, 2)(tokens(1, 9, DIM))
    with pytest.raises(ValueError, match="effvit::AFTLocal: window must be at least 1, got 0"):
        AFTLocal(DIM, 8, 0)
    with pytest.raises(ValueError, match="effvit::AFTConv: dim must be a multiple of num_heads 5"):
        AFTConv(DIM, 5)
    with pytest.raises(ValueError, match="effvit::AFTConv: kernel_size must be odd, got 4"):
        AFTConv(DIM, 3, 4)
