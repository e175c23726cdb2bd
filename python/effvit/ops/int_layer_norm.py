"""int_layer_norm: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.int_layer_norm import int_layer_norm as _definition
from . import _checks, _integer
from ._op import op

SQUARE_ROOTS = ("newton", "exact")


def check(op, dims, options, tensors):
    """What int_add_layer_norm checks as well."""
    _checks.given_together(op, tensors, "multiplier", "shift")
    _integer.check_integers(op, tensors, "multiplier", -_integer.LARGEST, _integer.LARGEST)
    _integer.check_integers(op, tensors, "shift", 1, _integer.MOST_SHIFT)


def _flops(dims, options):
    return 12 * torch.Size(dims["..."]).numel() * dims["C"], 0  # integer operations


OP = op(
    "int_layer_norm",
    "x: ... C | integer, bias?: C | int32 packed, multiplier?: C | int32 packed, shift?: C | int32 packed, "
    "offset?: C | int32 packed -> out: ... C | out_dtype",
    f"exact: bool = False, truncate: bool = False, {_integer.OUT_DTYPE.format(3)}",
    reference=lambda *tensors, **options: _definition(*tensors, **_integer.named(options)),
    saves=None,
    check=check,
    empty="... C",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=_flops,
)


def int_layer_norm(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    multiplier: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    *,
    square_root: str = "newton",
    deployed: bool = False,
    out_dtype: torch.dtype = torch.int32,
) -> torch.Tensor:
    """I-ViT's LayerNorm over the last dim with integers alone, the same bits on every device.

    ``y = x - mean``, ``k`` about ``sqrt(sum y^2)``, ``y * ((2^31 - 1) // k) >> 1``, plus an integer bias. A step of
    that is worth weight * sqrt(C) / 2^30, one for each channel.

    Args:
        x: [..., C] int32, int16, int8 or uint8, a last stride of 1. What is further than 46340 from its row's mean
            counts as that far. The result does not depend on the scale of x.
        bias, multiplier, shift, offset: [C] int32, from a LayerNorm's weight and bias by
            :func:`effvit.integer.layer_norm_constants`. The sum with bias saturates at int32. With multiplier and shift
            the result is requantised in the same pass: see :func:`effvit.ops.requantize`. offset is added to that,
            which saturates at int32 before and after.
        square_root: "newton": ten steps from 2^16, as the authors have it, which are above the root where the sum of
            squares is below 34,595. "exact": rounded down; 1 where all of a row is equal.
        deployed: as the authors' TVM kernels have it: mean and halving are rounded towards 0; else the mean to the
            nearest (ties to even) and the halving down.
        out_dtype: int32, int16, int8 or uint8. Results saturate.

    Returns:
        [..., C] in out_dtype, contiguous; not differentiable. Deterministic, bit for bit the formula in int64.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride, value or option is outside the above. The message names the argument.

    Source: I-ViT (arXiv:2207.01405).
    """
    name = OP.name
    exact = _checks.index_of(name, "square_root", square_root, SQUARE_ROOTS) == 1
    out_type = _integer.as_out_dtype(name, out_dtype)
    return OP(x, bias, multiplier, shift, offset, exact=exact, truncate=deployed, out_dtype=out_type)
