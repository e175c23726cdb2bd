"""shift_gelu in readable PyTorch: the definition. Integers, in int64."""

import torch

from .requantize import rescaled
from .shiftmax import LARGEST, reciprocal, saturate, shift_exp


def _shift_exp_any(d, x0, n, half_bit):
    """Of any d: above 0 the quotient is negative, and the result 2^31 - 1 where it would be more."""
    p = d + (d >> 1) - (d >> 4)
    q = torch.div(p, x0, rounding_mode="floor").clamp(max=0)
    r, left = p - q * x0, (n - q).clamp(max=33)
    e = ((r - 2 * x0) << left) >> 1 if half_bit else ((r >> 1) - x0) << left
    return torch.where(d > 0, e.clamp(max=LARGEST), shift_exp(d.clamp(max=0), x0, n, half_bit))


def shift_gelu(x, *, x0, n, bits, half_bit, safe_max, multiplier, shift, out_dtype):
    """x sigmoid(1.702 x) in steps of x's scale times 2^(1 - bits), or rescaled: [..., C] -> [..., C]."""
    if x.shape[-1] == 0:
        return x.to(out_dtype)
    x = x.long()
    top = x.amax(-1, keepdim=True)
    top = top.clamp(min=0) if safe_max else top
    e = shift_exp(x - top, x0, n, half_bit)
    y = x * (e * reciprocal(e + _shift_exp_any(-top, x0, n, half_bit)) >> (32 - bits))
    if multiplier:
        y = rescaled(y.clamp(-LARGEST - 1, LARGEST), multiplier, shift)
    return saturate(y, out_dtype)
