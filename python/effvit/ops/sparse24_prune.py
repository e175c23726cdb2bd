"""sparse24_prune: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.sparse24_prune import sparse24_prune as _definition
from ..reference.sparse24_prune import sparse24_prune_backward
from ._checks import index_of, value_error
from ._op import op
from ._sparse24 import ALGORITHMS, derive_groups


def _derive(op, dims, options, tensors):
    if options["decay"] > 1:
        raise value_error(op, "decay", "at most 1", options["decay"])
    derive_groups(op, dims, options, tensors)


def _backward(grad_out, w, *, algorithm, strength, decay):
    return sparse24_prune_backward(grad_out.float(), w.float(), algorithm=ALGORITHMS[algorithm], strength=strength)


OP = op(
    "sparse24_prune",
    "w: N K | strided -> out: N K",
    "algorithm: int in 0..1 = 0, strength: float >= 0 = 0.0002, decay: float >= 0 = 0.0",
    reference=lambda w, algorithm, strength, decay: _definition(w, algorithm=ALGORITHMS[algorithm], decay=decay),
    backward=_backward,
    derive=_derive,
    empty="N K",
    batch="N",
    autocast=False,
    flops=lambda dims, options: (3 * dims["N"] * dims["K"], 4 * dims["N"] * dims["K"]),  # comparisons and products
)


def sparse24_prune(
    w: torch.Tensor, *, algorithm: str = "magnitude", strength: float = 2e-4, decay: float = 0.0
) -> torch.Tensor:
    """A weight in training with all but two of each four neighbours set to 0, and a gradient for all of them.

    Args:
        w: [N, K] float32, bfloat16 or float16, any strides; K a multiple of 4, with "transposable" N too.
        algorithm: of :func:`effvit.ops.sparse24_mask`, which finds the mask anew in every call.
        strength: how strongly the gradient pulls masked weights towards 0 (SR-STE's lambda); 0: not at all. A loss
            that is scaled needs a strength that is scaled too.
        decay: from 0 to 1, what masked weights are multiplied by, if not by 0: training may lower it from 1 to 0
            (progressive gradient flow).

    Returns:
        [N, K] in the dtype of w, contiguous: ``(mask + decay * (1 - mask)) * w``.
        Its gradient goes straight through: ``dw = grad + strength * (1 - mask) * w``, whatever the mask and decay are.
        The pull is no derivative, so forward mode has none of it. The mask is found again in the backward, which
        keeps w only. Deterministic.

    Raises:
        TypeError: w is not a dense tensor or has the wrong dtype; an option has the wrong type.
        ValueError: a shape or option is outside the above. The message names the argument.

    Sources: SR-STE (arXiv:2102.04010), progressive gradient flow (arXiv:2402.04744).
    """
    return OP(w, algorithm=index_of(OP.name, "algorithm", algorithm, ALGORITHMS), strength=strength, decay=decay)
