"""requantize in readable PyTorch: the definition. Integers, in int64."""

import torch

from .shiftmax import saturate


def rescaled(z: torch.Tensor, m, c) -> torch.Tensor:
    """z m / 2^c to the nearest, ties to even, in int64: |z m| <= 2^62, 1 <= c <= 61."""
    t = z * m
    half = 1 << (c - 1) if isinstance(c, int) else torch.ones_like(c) << (c - 1)
    return (t + half - 1 + ((t >> c) & 1)) >> c


def requantize(x, multiplier, shift, residual, residual_multiplier, residual_shift, *, bits, out_dtype):
    """x m / 2^c, plus residual m' / 2^c', rounded each: [..., C] -> [..., C], saturating at `bits`."""
    y = rescaled(x.long(), multiplier.long(), shift.long())
    if residual is not None:
        y = y + rescaled(residual.long(), residual_multiplier.long(), residual_shift.long())
    ends = (0, 2**bits - 1) if out_dtype == torch.uint8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return saturate(y.clamp(*ends), out_dtype)
