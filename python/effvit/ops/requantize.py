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
    "x: ... C | integer, multiplier: C | int32 packed, shift: C | int32 packed, residual?: ... C | integer, "
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
    multiplier: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor | None = None,
    residual_multiplier: torch.Tensor | None = None,
    residual_shift: torch.Tensor | None = None,
    *,
    bits: int = 8,
    out_dtype: torch.dtype = torch.int8,
) -> torch.Tensor:
    """Steps of one scale in steps of another, with integers alone: ``x * multiplier / 2^shift``, ties to even.

    Args:
        x: [..., C] int32, int16, int8 or uint8, a last stride of 1.
        multiplier, shift: [C] int32, from :func:`effvit.integer.multipliers`. |multiplier| below 2^31, shift 1 to
            61; wrong values are an error where they can be read, on a CPU.
        residual: [..., C] of any of these dtypes, with its own two; rounded by itself and added before the result
            saturates.
        bits: the result is within what so many bits hold, 2 to 32, and within out_dtype: int8, uint8 (never below 0),
            int16 or int32.

    Returns:
        [..., C] in out_dtype, contiguous; not differentiable. Deterministic, bit for bit the formula in int64.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride, value or option is outside the above. The message names the argument.

    Source: I-ViT's QuantAct (arXiv:2207.01405).
    """
    out_type = _integer.as_out_dtype(OP.name, out_dtype)
    return OP(x, multiplier, shift, residual, residual_multiplier, residual_shift, bits=bits, out_dtype=out_type)
