"""int_layer_norm in readable PyTorch: the definition. Integers, in int64."""

import torch

from .requantize import rescaled
from .shiftmax import LARGEST, saturate

FURTHEST = 46340  # from the mean: its square is below 2^31


def _floor_div(a, b):
    return torch.div(a, b, rounding_mode="floor")


def square_root(v: torch.Tensor) -> torch.Tensor:
    """floor(sqrt(v)) of int64, by bits: v is below 2^62."""
    k = torch.zeros_like(v)
    for bit in range(30, -1, -1):
        larger = k + (1 << bit)
        k = torch.where(larger * larger <= v, larger, k)
    return k


def int_layer_norm(x, bias, multiplier, shift, offset, *, exact, truncate, out_dtype):
    """(x - mean) / sqrt(sum (x - mean)^2) in steps of 2^-30, plus bias, perhaps rescaled, plus offset.

    [..., C] -> [..., C].
    """
    if x.shape[-1] == 0:
        return x.to(out_dtype)
    x = x.long()
    total, columns = x.sum(-1, keepdim=True), x.shape[-1]
    if truncate:
        mean = torch.div(total, columns, rounding_mode="trunc")
    else:
        mean = _floor_div(total, columns)
        rest = 2 * (total - mean * columns)
        mean = mean + ((rest > columns) | ((rest == columns) & (mean & 1 == 1))).long()
    y = (x - mean).clamp(-FURTHEST, FURTHEST)
    v = (y * y).sum(-1, keepdim=True)
    if exact:
        k = square_root(v).clamp(min=1)
    else:
        k = torch.full_like(v, 2**16)
        for _ in range(10):
            k = (k + _floor_div(v, k)) >> 1
    y = y * _floor_div(torch.full_like(k, LARGEST), k)
    y = torch.div(y, 2, rounding_mode="trunc") if truncate else y >> 1
    if bias is not None:
        y = (y + bias.long()).clamp(-LARGEST - 1, LARGEST)
    if multiplier is not None:
        y = rescaled(y, multiplier.long(), shift.long())
    if offset is not None:
        y = y.clamp(-LARGEST - 1, LARGEST) + offset.long()
    return saturate(y, out_dtype)
