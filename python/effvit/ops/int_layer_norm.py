"""int_layer_norm: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.int_layer_norm import int_layer_norm as _definition
from . import _checks, _integer
from ._op import op

SQUARE_ROOTS = ("newton", "exact")


def _check(op, dims, options, tensors):
    _checks.given_together(op, tensors, "multiplier", "shift")
    _integer.check_integers(op, tensors, "multiplier", -_integer.LARGEST, _integer.LARGEST)
    _integer.check_integers(op, tensors, "shift", 1, _integer.MOST_SHIFT)


def _flops(dims, options):
    return 12 * torch.Size(dims["..."]).numel() * dims["C"], 0  # integer operations


OP = op(
    "int_layer_norm",
    "x: ... C | int32, bias?: C | int32 packed, multiplier?: C | int32 packed, shift?: C | int32 packed "
    "-> out: ... C | out_dtype",
    f"exact: bool = False, truncate: bool = False, {_integer.OUT_DTYPE.format(3)}",
    reference=lambda *tensors, **options: _definition(*tensors, **_integer.named(options)),
    saves=None,
    check=_check,
    empty="... C",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=_flops,
)


def constants(weight: torch.Tensor, bias: torch.Tensor | None = None, out_scale: float | None = None):
    """(bias, multiplier, shift) of :data:`OP`, [C] int32 each or None, from a LayerNorm's float parameters, in float64.

    A step of the result is weight * sqrt(C) / 2^30, or out_scale. The bias must fit into int32 in steps of the former:
    |bias| below 2 sqrt(C) |weight|. A channel of less than 2^-31 out_scale a step is 0.
    """
    name = OP.name
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


def int_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    out_scale: float | torch.Tensor | None = None,
    square_root: str = "newton",
    deployed: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """I-ViT's LayerNorm over the last dim with integers alone, the same bits on every device.

    ``y = x - mean``, ``k`` about ``sqrt(sum y^2)``, ``y * ((2^31 - 1) // k) >> 1``, plus an integer bias.

    Args:
        x: [..., C] int32, a last stride of 1. What is further than 46340 from its row's mean counts as that far. The
            result does not depend on the scale of x.
        weight, bias: [C], any float dtype, of a LayerNorm: :func:`effvit.ops.int_layer_norm.constants` makes integers
            of them, which waits for their device. |bias| must be below 2 sqrt(C) |weight|. Without weight, that is 1.
        out_scale: what one step of the result shall be worth: it is requantised in the same pass, ties to even. None:
            a step is weight * sqrt(C) / 2^30, one for each channel.
        square_root: "newton": ten steps from 2^16, as the authors have it, which are above the root where the sum of
            squares is below 34,595. "exact": rounded down; 1 where all of a row is equal.
        deployed: as the authors' TVM kernels have it: mean and halving are rounded towards 0; else the mean to the
            nearest (ties to even) and the halving down.
        out_dtype: int32, int16, int8 or uint8; None: int8 where out_scale is given, else int32. Results saturate.

    Returns:
        [..., C] in out_dtype, contiguous; not differentiable. Deterministic, bit for bit the formula in int64.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride, parameter or option is outside the above. The message names the argument.

    Source: I-ViT (arXiv:2207.01405).
    """
    name = OP.name
    _checks.check_tensor(name, "x", x)
    for argument, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        _checks.check_tensor(name, argument, t)
        if x.dim() == 0 or t.shape != x.shape[-1:]:
            raise _checks.value_error(name, argument, f"[C] = {list(x.shape[-1:])}", _checks.shape(t))
    exact = _checks.index_of(name, "square_root", square_root, SQUARE_ROOTS) == 1
    integers = (None, None, None)
    if weight is not None or bias is not None or out_scale is not None:
        if x.dim() == 0:
            raise _checks.value_error(name, "x", "[..., C]", "[]")
        weight = torch.ones(x.shape[-1]) if weight is None else weight
        step = None if out_scale is None else _integer.as_scale(name, "out_scale", out_scale)
        made = constants(weight.cpu(), None if bias is None else bias.cpu(), step)
        integers = tuple(None if t is None else t.to(x.device) for t in made)
    if out_dtype is None:
        out_dtype = torch.int32 if out_scale is None else torch.int8
    return OP(x, *integers, exact=exact, truncate=deployed, out_dtype=_integer.as_out_dtype(name, out_dtype))
