"""int8_prepack: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.int8_prepack import int8_prepack as _definition
from ..reference.int8_prepack import packed_width
from ._int8 import LIMITS
from ._op import op


def _derive(op, dims, options, tensors):
    dims["R"], dims["C"] = (dims["N"] + 15) // 16, packed_width(dims["K"])


OP = op(
    "int8_prepack",
    "weight: N K | int8 strided -> packed: R C | int8",
    reference=_definition,
    saves=None,
    limits={"weight.K": LIMITS["x.K"]},
    derive=_derive,
    empty="N",
    flops=lambda dims, options: (dims["N"] * dims["K"], 0),
)


def int8_prepack(weight: torch.Tensor) -> torch.Tensor:
    """Weights of :func:`effvit.ops.int8_linear` in the order in which its CPU kernels read them.

    One layout for every instruction set, so a packed weight may be stored and moved to another machine; as a tensor it
    is opaque. Per block of 16 output channels ``[ceil(K/4)][16][4]`` bytes, each the weight plus 128, and 64 bytes
    that say what it is: a weight of another shape or kind is refused.

    Args:
        weight: [N, K] int8, any strides; K at most 131072.

    Returns:
        [ceil(N/16), 64 * (ceil(K/4) + 1)] int8.

    Raises:
        TypeError: weight is not a dense int8 tensor. ValueError: it is not [N, K].
    """
    return OP(weight)
