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


def linear_constants(
    weight: torch.Tensor, bias: torch.Tensor | None, x_scale: float | torch.Tensor, out_scale: float | torch.Tensor
):
    """(weight int8 [N, K], bias [N] or None, multiplier [N], shift [N], int32 each) of a linear layer for
    :func:`effvit.ops.int_linear`, from its float parameters. They are computed in float64.

    With S_w = max|weight| / 127 of an output channel, weights are round(weight / S_w), the bias is round(bias / (S_w
    x_scale)), saturating at what int32 holds, and multiplier / 2^shift is S_w x_scale / out_scale; ties go to the even
    number. S_w is larger where the bias would exceed int32, so that it is exact to 2^-32 of itself, and where a step
    would be less than 2^-31 of out_scale, which no shift makes: such weights cannot be seen in the result.

    Args:
        weight: [N, K], any float dtype, finite. bias: [N] or None.
        x_scale: what one step of x is worth, a number or a tensor of one element; a tensor is read, which waits for
            its device.
        out_scale: likewise of the result; or [N], of every output channel.

    Raises:
        TypeError: weight or bias is not a float tensor. ValueError: they are not [N, K] and [N] or not finite, a scale
            is not positive and finite, or a step of a sum is 2^30 of out_scale or more.

    Source: I-ViT's QuantLinear (arXiv:2207.01405), whose formulas these are where S_w is not larger.
    """
    name = "int_linear"
    _checks.check_tensor(name, "weight", weight)
    if weight.dim() != 2:
        raise _checks.value_error(name, "weight", "[N, K]", _checks.shape(weight))
    n, k = weight.shape
    w = _finite(name, "weight", weight)
    x_scale = _integer.as_scale(name, "x_scale", x_scale)
    of_out = _integer.scales(name, "out_scale", out_scale, n, "N").to(w.device)
    step = torch.maximum(w.abs().amax(1) if k else w.new_zeros(n), w.new_zeros(())) / 127 * x_scale
    step = torch.maximum(step, of_out * 2.0**-31)
    integers = None
    if bias is not None:
        _checks.check_tensor(name, "bias", bias)
        if bias.shape != (n,):
            raise _checks.value_error(name, "bias", f"[N] = [{n}]", _checks.shape(bias))
        b = _finite(name, "bias", bias)
        step = torch.maximum(step, b.abs() / _integer.LARGEST)
        integers = (b / step).round().clamp(-_integer.LARGEST - 1, _integer.LARGEST).to(torch.int32)
    quantized = (w / (step / x_scale)[:, None]).round().clamp(-127, 127).to(torch.int8)
    ratio = step / of_out
    if not (ratio < 2.0**30).all():
        at = int((~(ratio < 2.0**30)).nonzero()[0])
        raise _checks.value_error(
            name, "out_scale", f"above 2^-30 of a step of the sum, {float(step[at])}", f"{float(of_out.expand(n)[at])}"
        )
    m, c = _integer.fixed_point_of(ratio)
    return quantized, integers, m.to(torch.int32), c.to(torch.int32)


def _finite(op: str, name: str, t: torch.Tensor) -> torch.Tensor:
    """A float tensor's values in float64."""
    if not t.is_floating_point():
        raise _checks.type_error(op, name, "a float tensor", t.dtype)
    t = t.detach().double()
    if not t.isfinite().all():
        raise _checks.value_error(op, name, "finite", float(t[~t.isfinite()][0]))
    return t


def layer_norm_constants(weight: torch.Tensor, bias: torch.Tensor | None = None, out_scale: float | None = None):
    """(bias, multiplier, shift, offset) of :func:`effvit.ops.int_layer_norm`, [C] int32 each or None.

    They are computed in float64 from a LayerNorm's parameters, [C] each, finite.

    A step of the result is weight * sqrt(C) / 2^30, or out_scale. In steps of the former a bias is an int32 where it is
    below 2 sqrt(C) |weight|, which those of channels that training has pruned are not: without out_scale an error, and
    from the half of it on the sum with some numbers saturates. With out_scale the bias of such a channel is ``offset``,
    the nearest multiple of out_scale, which is added after the rescaling, and the rest, at most out_scale / 2, in steps
    of the former: 2^30 of them or fewer, as steps below out_scale / 2^31 have no multiplier. Numbers are within 2^30 as
    well, so nothing saturates, and the results are as exact as those of other channels. A channel of smaller steps,
    weights of 0 included, is its offset: what is left of it is below a half. offset is None where no channel needs one.
    """
    name = "int_layer_norm"
    weight, has_bias = weight.detach().double(), bias is not None
    bias = bias.detach().double() if has_bias else torch.zeros_like(weight)
    for argument, values in (("weight", weight), ("bias", bias)):
        if not values.isfinite().all():
            raise _checks.value_error(name, argument, "finite", "others")
    step = weight * weight.shape[0] ** 0.5 / 2.0**30
    shifted = _steps(bias, step)
    if out_scale is None:
        beyond = ~(shifted.abs() < 2.0**31)
        if beyond.any():
            at = int(beyond.nonzero()[0])
            raise _checks.value_error(
                name, "bias", "below 2 sqrt(C) |weight| where there is no out_scale",
                f"{float(bias[at])} with weight {float(weight[at])} at [{at}]",
            )  # fmt: skip
        return shifted.to(torch.int32) if has_bias else None, None, None, None
    out_scale = _integer.as_scale(name, "out_scale", out_scale)
    ratio = step / out_scale
    if not (ratio.abs() < 2.0**30).all():
        raise _checks.value_error(name, "out_scale", "above 2^-60 sqrt(C) |weight|", out_scale)
    small, large = ratio.abs() < 2.0**-31, ~(shifted.abs() <= 2.0**30)
    whole = torch.where(large | small, torch.round(bias / out_scale), 0.0)
    if not (whole.abs() < 2.0**31).all():
        raise _checks.value_error(name, "out_scale", "above 2^-31 |bias|", out_scale)
    integers = torch.where(small, 0.0, torch.where(large, _steps(bias - whole * out_scale, step), shifted))
    m, c = _integer.fixed_point_of(ratio)
    m, c = torch.where(small, 0, m), torch.where(small, 31, c)
    integers, m, c, offset = (t.to(torch.int32) for t in (integers, m, c, whole))
    return integers if has_bias else None, m, c, offset if offset.any() else None


def _steps(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """floor(x / step); 0 of 0, whatever the step."""
    return torch.where(x == 0, 0.0, torch.floor(x / step))
