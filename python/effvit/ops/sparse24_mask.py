"""sparse24_mask: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.sparse24_mask import sparse24_mask as _definition
from ._checks import index_of
from ._op import op
from ._sparse24 import ALGORITHMS, derive_groups

OP = op(
    "sparse24_mask",
    "w: N K | strided -> mask: N K | uint8",
    "algorithm: int in 0..1 = 0",
    reference=lambda w, algorithm: _definition(w, algorithm=ALGORITHMS[algorithm]).to(torch.uint8),
    saves=None,
    derive=derive_groups,
    empty="N K",
    batch="N",
    autocast=False,
    flops=lambda dims, options: (2 * dims["N"] * dims["K"], 0),  # magnitude's comparisons
)


def sparse24_mask(w: torch.Tensor, *, algorithm: str = "magnitude") -> torch.Tensor:
    """Which weights a 2:4-sparse matrix keeps: two of each four neighbours along K.

    Args:
        w: [N, K] float32, bfloat16 or float16, any strides; K a multiple of 4, with "transposable" N too. NaN counts
            as infinite.
        algorithm: "magnitude": the two largest |w|, the earlier of equals. "transposable": of each 4 x 4 block two in
            every row and two in every column, so that the transpose is 2:4 sparse too; of the 90 ways the one with
            the largest sum of |w|, found exactly, of equals always the same.

    Returns:
        [N, K] bool, contiguous; the same on every device. `torch.ops.effvit.sparse24_mask` returns it as uint8.

    Raises:
        TypeError: w is not a dense tensor or has the wrong dtype; algorithm is not a string.
        ValueError: a shape or algorithm is outside the above. The message names the argument.

    Sources: Mishra et al. (arXiv:2104.08378); Hubara et al. (arXiv:2102.08124), transposable masks.
    """
    return OP(w, algorithm=index_of(OP.name, "algorithm", algorithm, ALGORITHMS)).view(torch.bool)
