"""sparse24_compress: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.sparse24_compress import sparse24_compress as _definition
from ._checks import shape, value_error
from ._op import op
from ._sparse24 import check_sparse


def _derive(op, dims, options, tensors):
    if dims["K"] % 4:
        raise value_error(op, "w", "[N, K] with K a multiple of 4", shape(tensors["w"]))
    dims["K2"], dims["K8"] = dims["K"] // 2, (dims["K"] + 7) // 8


OP = op(
    "sparse24_compress",
    "w: N K | number strided -> values: N K2, meta: N K8 | uint8",
    reference=_definition,
    saves=None,
    derive=_derive,
    check=check_sparse,
    empty="N K",
    batch="N",
    flops=lambda dims, options: (dims["N"] * dims["K"], 0),
)


def sparse24_compress(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A 2:4-sparse weight in the canonical form: half the values, and where they were.

    Of each four neighbours along K, a group, two are kept, at positions i0 < i1. Where fewer than two are nonzero,
    zeros are kept too, at positions that depend on w alone: beside one at p < 3 that at 3, else those at 2 and 3.

    Args:
        w: [N, K] int8, float32, bfloat16 or float16, any strides; K a multiple of 4, at most two nonzero in a group:
            ``w * effvit.sparse24_mask(w)``, say.

    Returns:
        (values, meta). values: [N, K / 2] in the dtype of w, differentiable in w. meta: [N, ceil(K / 8)] uint8, for
        each group the four bits i0 | i1 << 2; the low ones of a byte are the first group's. 0b1110 fills the last byte
        of an odd number of groups.

    Raises:
        TypeError: w is not a dense tensor or has the wrong dtype.
        ValueError: w is not [N, K] with K a multiple of 4, or a group has more than two nonzero; the message names its
            row and columns. On a GPU this check waits for the device; under a compiler nobody checks.
    """
    return OP(w)
