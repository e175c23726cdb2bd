"""fake_quantize_lut: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.fake_quantize_lut import fake_quantize_lut as _definition
from . import _lut
from ._op import op


def _check(op, dims, options, tensors):
    _lut.check_ascending(op, tensors)


def _flops(dims, options):
    return _lut.elements(dims) * (dims["T"].bit_length() + 1), 0  # a comparison for each bit of a code, a look-up


OP = op(
    "fake_quantize_lut",
    "x: ... C, thresholds: T | float32 packed, values: T+1 | float32 packed -> out: ... C",
    reference=_definition,
    saves=None,
    limits=_lut.limits("thresholds", "T", _lut.MOST - 1),
    check=_check,
    empty="... C",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=_flops,
)


def fake_quantize_lut(x: torch.Tensor, thresholds: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What a non-uniform quantiser keeps of x, in one pass: the values of the codes that ``quantize_lut`` finds.

    Args:
        x: [..., C] float32, bfloat16 or float16, a last stride of 1, one to six dims.
        thresholds: [T] float32, 1 to 255 in ascending order; checked where they can be read, on a CPU.
        values: [T + 1] float32: of numbers below the first threshold, from the first to the second, and so on.

    Returns:
        [..., C] in the dtype of x, contiguous; a NaN stays. Deterministic.

    Differentiable straight through: the gradient of x is the one that arrives, and 0 where x lies below all values or
    above them. Those of values are the sums over the numbers that became them; thresholds get none. Gradients are the
    definition's, in PyTorch.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride or value is outside the above. The message names the argument.
    """
    return OP(x, thresholds, values)
