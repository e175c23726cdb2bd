"""quantize_lut: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.quantize_lut import quantize_lut as _definition
from . import _checks, _lut
from ._op import op


def _check(op, dims, options, tensors):
    _lut.check_ascending(op, tensors)


def _flops(dims, options):
    return _lut.elements(dims) * dims["T"].bit_length(), 0  # a comparison for each bit of a code


OP = op(
    "quantize_lut",
    "x: ... C, thresholds: T | float32 packed -> q: ... C | uint8",
    "descending: bool = False",
    reference=lambda x, thresholds, descending: _definition(x, thresholds, descending=descending),
    saves=None,
    limits=_lut.limits("thresholds", "T", _lut.MOST - 1),
    check=_check,
    empty="... C",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=_flops,
)


def quantize_lut(x: torch.Tensor, thresholds: torch.Tensor, *, descending: bool = False) -> torch.Tensor:
    """Codes of any non-uniform quantiser: how many thresholds are at most x, bit for bit the same on every device.

    A quantiser whose codes rise or fall with x is a list of thresholds, the smallest number of each code.
    :mod:`effvit.quantizers` computes those of log2, log-sqrt2, AdaLog, shift-uniform-log2, tan and uniform quantisers
    exactly; no logarithm is taken here, so no code depends on how one is rounded.

    Args:
        x: [..., C] float32, bfloat16 or float16, a last stride of 1, one to six dims.
        thresholds: [T] float32, 1 to 255 in ascending order; checked where they can be read, on a CPU. Equal ones
            leave out a code.
        descending: count the thresholds above x instead, T less the others: codes that fall where x rises, like those
            of the logarithmic quantisers.

    Returns:
        [..., C] uint8, contiguous; not differentiable: see :func:`effvit.ops.fake_quantize_lut`. A NaN counts as
        below every threshold. Deterministic.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride or value is outside the above. The message names the argument.
    """
    _checks.check_tensor(OP.name, "x", x)
    return OP(x, thresholds, descending=_checks.as_bool(OP.name, "descending", descending))
