"""sparse24_decompress: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.sparse24_compress import sparse24_decompress as _definition
from ._op import op
from ._sparse24 import check_meta, derive_meta

OP = op(
    "sparse24_decompress",
    "values: N K2 | number strided, meta: N K8 | uint8 strided -> w: N K",
    reference=_definition,
    saves=None,
    derive=derive_meta,
    check=check_meta,
    empty="N K",
    batch="N",
    flops=lambda dims, options: (dims["N"] * dims["K"], 0),
)


def sparse24_decompress(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """The weight of which :func:`effvit.ops.sparse24_compress` made values and meta.

    Args:
        values: [N, K / 2] int8, float32, bfloat16 or float16; meta: [N, ceil(K / 8)] uint8. Any strides.

    Returns:
        [N, K] in the dtype of values, contiguous; differentiable in values.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape or device is outside the above, or four bits of meta are not two positions in ascending
            order (where values can be read, on a CPU). The message names the argument.
    """
    return OP(values, meta)
