"""int_add_layer_norm: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.int_add_layer_norm import int_add_layer_norm as _definition
from . import _checks, _integer
from ._op import op
from .int_layer_norm import SQUARE_ROOTS
from .int_layer_norm import check as _check_layer_norm


def _check(op, dims, options, tensors):
    for name in ("x", "residual"):
        _integer.check_integers(op, tensors, f"{name}_multiplier", -_integer.LARGEST, _integer.LARGEST)
        _integer.check_integers(op, tensors, f"{name}_shift", 1, _integer.MOST_SHIFT)
    _check_layer_norm(op, dims, options, tensors)


def _flops(dims, options):
    return 20 * torch.Size(dims["..."]).numel() * dims["C"], 0  # integer operations


OP = op(
    "int_add_layer_norm",
    "x: ... C | integer, residual: ... C | integer, x_multiplier: C | int32 packed, x_shift: C | int32 packed, "
    "residual_multiplier: C | int32 packed, residual_shift: C | int32 packed, bias?: C | int32 packed, "
    "multiplier?: C | int32 packed, shift?: C | int32 packed, offset?: C | int32 packed "
    "-> out: ... C | out_dtype, sum: ... C | int16",
    f"exact: bool = False, truncate: bool = False, bits: int in 2..16 = 16, {_integer.OUT_DTYPE.format(3)}",
    reference=lambda *tensors, **options: _definition(*tensors, **_integer.named(options)),
    saves=None,
    check=_check,
    empty="... C",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=_flops,
)


def int_add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    x_multiplier: torch.Tensor,
    x_shift: torch.Tensor,
    residual_multiplier: torch.Tensor,
    residual_shift: torch.Tensor,
    bias: torch.Tensor | None = None,
    multiplier: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    *,
    square_root: str = "newton",
    deployed: bool = False,
    bits: int = 16,
    out_dtype: torch.dtype = torch.int32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual connection and the LayerNorm after it in one pass, with integers alone: (norm(sum), sum).

    ``sum`` is :func:`effvit.ops.requantize` of x with residual, ``norm`` is :func:`effvit.ops.int_layer_norm`: the same
    bits as these two one after the other, without the sum being read again.

    Args:
        x, residual: [..., C], int32, int16, int8 or uint8 each, a last stride of 1.
        x_multiplier, x_shift, residual_multiplier, residual_shift: [C] int32, from :func:`effvit.integer.multipliers`:
            x and residual in steps of the sum.
        bias, multiplier, shift, offset: [C] int32 or None, from :func:`effvit.integer.layer_norm_constants`.
        square_root, deployed: see :func:`effvit.ops.int_layer_norm`.
        bits: the sum saturates at what so many bits hold, 2 to 16.
        out_dtype: of the first result: int32, int16, int8 or uint8, where it saturates.

    Returns:
        [..., C] in out_dtype, and the sum, [..., C] int16; contiguous, not differentiable. Deterministic, bit for bit
        the formulas in int64.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride, value or option is outside the above. The message names the argument.

    Source: I-ViT (arXiv:2207.01405): QuantAct with an identity, and I-LayerNorm.
    """
    name = OP.name
    exact = _checks.index_of(name, "square_root", square_root, SQUARE_ROOTS) == 1
    options = {"exact": exact, "truncate": deployed, "bits": bits}
    scales = (x_multiplier, x_shift, residual_multiplier, residual_shift)
    constants = (bias, multiplier, shift, offset)
    return OP(x, residual, *scales, *constants, **options, out_dtype=_integer.as_out_dtype(name, out_dtype))
