"""requantize: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.requantize import requantize as _definition
from . import _checks, _integer
from ._op import op


def _check(op, dims, options, tensors):
    for name in ("residual_multiplier", "residual_shift"):
        _checks.given_together(op, tensors, "residual", name)
    _integer.check_integers(op, tensors, "multiplier", -_integer.LARGEST, _integer.LARGEST)
    _integer.check_integers(op, tensors, "residual_multiplier", -_integer.LARGEST, _integer.LARGEST)
    _integer.check_integers(op, tensors, "shift", 1, _integer.MOST_SHIFT)
    _integer.check_integers(op, tensors, "residual_shift", 1, _integer.MOST_SHIFT)


def _flops(dims, options):
    return 8 * torch.Size(dims["..."]).numel() * dims["C"], 0  # integer operations


OP = op(
    "requantize",
    "x: ... C | int32, multiplier: C | int32 packed, shift: C | int32 packed, residual?: ... C | int32, "
    "residual_multiplier?: C | int32 packed, residual_shift?: C | int32 packed -> out: ... C | out_dtype",
    f"bits: int in 2..32 = 8, {_integer.OUT_DTYPE.format(4)}",
    reference=lambda *tensors, **options: _definition(*tensors, **_integer.named(options)),
    saves=None,
    check=_check,
    empty="... C",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=_flops,
)


def requantize(
    x: torch.Tensor,
    scale: float | torch.Tensor,
    out_scale: float | torch.Tensor,
    residual: torch.Tensor | None = None,
    residual_scale: float | torch.Tensor | None = None,
    *,
    bits: int = 8,
    out_dtype: torch.dtype = torch.int8,
) -> torch.Tensor:
    """Integers in steps of `scale` in steps of `out_scale`, with integers alone: ``x * m / 2^c``, ties to even.

    Args:
        x: [..., C] int32, a last stride of 1.
        scale, out_scale: what one step is worth: numbers, or tensors of one element or of [C]. Their ratio is taken in
            float64 as m / 2^c with 2^30 <= |m| < 2^31, its mantissa rounded to the nearest, a half up. It must be not 0
            and below 2^30, and not below 2^-31. A negative one is right for a channel whose weight is negative.
        residual: [..., C] int32, in steps of residual_scale, rounded by itself and added before the result saturates.
        bits: the result is within what so many bits hold, and within out_dtype: int8, uint8 (never below 0), int16 or
            int32.

    Returns:
        [..., C] in out_dtype, contiguous; not differentiable. Deterministic, bit for bit the formula in int64.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride, scale or option is outside the above. The message names the argument.

    Source: I-ViT's QuantAct (arXiv:2207.01405).
    """
    name = OP.name
    _checks.check_tensor(name, "x", x)
    if x.dim() == 0:
        raise _checks.value_error(name, "x", "[..., C]", "[]")
    of_x = _integer.fixed_points(name, "scale", scale, out_scale, x)
    if (residual is None) != (residual_scale is None):
        missing = "residual" if residual is None else "residual_scale"
        raise _checks.value_error(name, missing, "given where the other of residual and residual_scale is", None)
    of_residual = (None, None)
    if residual is not None:
        of_residual = _integer.fixed_points(name, "residual_scale", residual_scale, out_scale, x)
    return OP(x, *of_x, residual, *of_residual, bits=bits, out_dtype=_integer.as_out_dtype(name, out_dtype))
