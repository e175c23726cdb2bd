"""pam_matmul in readable PyTorch: the definition, differentiable, exact in float32 but for its sums."""

import torch

LEAST = 2.0**-126  # of normal float32 numbers; what is smaller counts as 0
ELEMENTS = 1 << 24  # of products at a time


def _scaled(x):
    """(x / 2^e, 2^e) of |x|: 1 <= |x / 2^e| < 2; (0, 0) for zeros."""
    exponent = torch.frexp(x.detach()).exponent - 1
    scale = torch.ldexp(torch.ones_like(x.detach()), exponent)
    there = x.detach().abs() >= LEAST
    return torch.where(there, x / torch.where(there, scale, 1), 0), torch.where(there, scale, 0)


def pam(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Piecewise affine multiplication of finite numbers, elementwise, as adding their bits as integers does it.

    With |a| = 2^e (1 + m), |b| = 2^f (1 + n): 2^(e + f) (1 + m + n) where m + n < 1, else 2^(e + f + 1) (m + n). What
    is below 2^-126 is 0, from 2^128 on infinite. The derivative is that of the piece: a power of two.
    """
    (a, a_scale), (b, b_scale) = _scaled(a), _scaled(b)
    u, v = a.abs() - 1, b.abs() - 1
    size = torch.where(u.detach() + v.detach() < 1, 1 + u + v, 2 * (u + v))
    sign = torch.sign(a.detach()) * torch.sign(b.detach())  # 0 for zeros
    large = a_scale.double() * b_scale.double()
    exact = size.detach().double() * large
    product = sign * size * a_scale * b_scale if size.dtype == torch.float64 else sign * _times(size, a_scale, b_scale)
    product = torch.where(exact < LEAST, torch.zeros_like(product), product)
    return torch.where(exact >= 2.0**128, sign * torch.inf, product)


def _times(size, a_scale, b_scale):
    """size a_scale b_scale without an overflow or underflow in between: the one nearer to 1 last."""
    low, high = torch.minimum(a_scale, b_scale), torch.maximum(a_scale, b_scale)
    return torch.where(high >= 1, size * low * high, size * high * low)


def pam_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, K], weight [N, K] -> sum over k of pam(x, weight): [M, N]; NaN where a row of either is not finite."""
    rows = max(1, ELEMENTS // max(1, weight.numel()))
    finite = [torch.isfinite(t).all(1) for t in (x, weight)]
    x, weight = (torch.where(f[:, None], t, 0) for f, t in zip(finite, (x, weight), strict=True))
    parts = [pam(part[:, None, :], weight[None]).sum(-1) for part in x.split(rows)]
    out = torch.cat(parts) if parts else x.new_zeros(0, weight.shape[0])
    return torch.where(finite[0][:, None] & finite[1], out, torch.nan)
