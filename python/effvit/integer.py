"""Integers that stand for scales, for the integer-only operators: computed here, in float64, and nowhere else."""

from __future__ import annotations

import torch

from .ops import _checks, _integer


def multipliers(scale: float | torch.Tensor, out_scale: float | torch.Tensor, x: torch.Tensor):
    """(multiplier, shift), [C] int32 each, that make steps of out_scale of steps of scale, for x [..., C].

    scale, out_scale: numbers, or tensors of one element or of [C]; a tensor is read, which waits for its device. Their
    ratio is taken in float64 as m / 2^c with 2^30 <= |m| < 2^31, its mantissa rounded to the nearest, a half up. It
    must be not 0, below 2^30 and not below 2^-31. A negative one is right for a channel whose weight is negative.
    """
    return _integer.fixed_points("requantize", "scale", scale, out_scale, x)


def layer_norm_constants(weight: torch.Tensor, bias: torch.Tensor | None = None, out_scale: float | None = None):
    """(bias, multiplier, shift) of :func:`effvit.ops.int_layer_norm`, [C] int32 each or None.

    They are computed in float64 from a LayerNorm's parameters, [C] each.

    A step of the result is weight * sqrt(C) / 2^30, or out_scale. The bias must fit into int32 in steps of the former:
    |bias| below 2 sqrt(C) |weight|. A channel of less than 2^-31 out_scale a step is 0.
    """
    name = "int_layer_norm"
    step = weight.detach().double() * weight.shape[0] ** 0.5 / 2.0**30
    integers = None
    if bias is not None:
        shifted = torch.where(bias == 0, 0.0, torch.floor(bias.detach().double() / step))
        if not (shifted.abs() < 2.0**31).all():
            at = int((~(shifted.abs() < 2.0**31)).nonzero()[0])
            raise _checks.value_error(
                name, "bias", "below 2 sqrt(C) |weight|", f"{float(bias[at])} with weight {float(weight[at])} at [{at}]"
            )
        integers = shifted.to(torch.int32)
    if out_scale is None:
        return integers, None, None
    ratio = step / out_scale
    if not (ratio.abs() < 2.0**30).all():
        raise _checks.value_error(name, "out_scale", "above 2^-60 sqrt(C) |weight|", out_scale)
    m, c = _integer.fixed_point_of(ratio)
    small = ratio.abs() < 2.0**-31
    return integers, *(torch.where(small, other, t).to(torch.int32) for t, other in ((m, 0), (c, 31)))
