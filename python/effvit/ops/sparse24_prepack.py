"""sparse24_prepack: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.sparse24_prepack import packed_width
from ..reference.sparse24_prepack import sparse24_prepack as _definition
from ._int8 import MAX_K
from ._op import op
from ._sparse24 import check_meta, derive_meta


def _derive(op, dims, options, tensors):
    derive_meta(op, dims, options, tensors)
    dims["R"], dims["C"] = (dims["N"] + 15) // 16, packed_width(dims["K"])


OP = op(
    "sparse24_prepack",
    "values: N K2 | int8 strided, meta: N K8 | uint8 strided -> packed: R C | int8",
    reference=_definition,
    saves=None,
    limits={"values.K2": (0, MAX_K // 2, f"be [N, K / 2] with K at most {MAX_K}")},
    derive=_derive,
    check=check_meta,
    empty="N",
    flops=lambda dims, options: (dims["N"] * dims["K2"], 0),
)


def sparse24_prepack(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """Weights of :func:`effvit.ops.sparse24_int8_linear` in the order in which its CPU kernels read them.

    One layout for every instruction set, so a packed weight may be stored and moved to another machine; as a tensor it
    is opaque. Per block of 16 output channels the values ``[ceil(K/8)][16][4]``, their positions, regrouped,
    ``[ceil(K/32)][16][4]``, the channels' sums, and 64 bytes that say what it is.
    ``effvit.sparse24_formats.unpack`` is the way back.

    Args:
        values, meta: what :func:`effvit.ops.sparse24_compress` returned for an int8 weight, any strides; K at most
            131072.

    Returns:
        [ceil(N/16), 64 * (ceil(K/8) + ceil(K/32) + 2)] int8.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape or device is outside the above, or four bits of meta are not two positions in ascending
            order (where values can be read, on a CPU). The message names the argument.
    """
    return OP(values, meta)
