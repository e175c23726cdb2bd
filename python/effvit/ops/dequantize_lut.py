"""dequantize_lut: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.dequantize_lut import dequantize_lut as _definition
from . import _checks, _lut
from ._declaration import OUT_DTYPES
from ._op import op

DTYPES = {getattr(torch, name): i for i, name in enumerate(OUT_DTYPES[:3])}


def _flops(dims, options):
    return _lut.elements(dims), 0  # look-ups


OP = op(
    "dequantize_lut",
    "q: ... C | uint8, values: V | float32 packed -> out: ... C | out_dtype",
    "out_dtype: int in 0..2 = 0",
    reference=lambda q, values, out_dtype: _definition(q, values),  # its result is rounded to out_dtype
    saves=None,
    limits=_lut.limits("values", "V", _lut.MOST),
    empty="... C",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=_flops,
)


def dequantize_lut(q: torch.Tensor, values: torch.Tensor, *, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``values[q]``: what the codes of :func:`effvit.ops.quantize_lut` stand for.

    Args:
        q: [..., C] uint8, a last stride of 1, one to six dims.
        values: [V] float32, 1 to 256, what each code is worth.
        out_dtype: float32, bfloat16 or float16, to which values are rounded once.

    Returns:
        [..., C] in out_dtype, contiguous; NaN for a code that has no value. Differentiable in values. Deterministic.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape or stride is outside the above. The message names the argument.
    """
    _checks.check_tensor(OP.name, "q", q)
    if out_dtype not in DTYPES:
        raise _checks.type_error(OP.name, "out_dtype", "torch.float32, torch.bfloat16 or torch.float16", out_dtype)
    return OP(q, values, out_dtype=DTYPES[out_dtype])
