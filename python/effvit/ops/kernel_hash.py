"""kernel_hash: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.kernel_hash import kernel_hash as _definition
from ._op import op


def _flops(dims, options):
    tokens = dims["B"] * dims["L"] * dims["H"]
    return tokens * 2 * dims["P"] * (dims["K"] + dims["F"] + 2), 0


OP = op(
    "kernel_hash",
    "x: B L H K, anchors: H P K | float32 packed, mean: H P | float32 packed, projection: H F P | float32 packed "
    "-> out: B L H F",
    reference=_definition,
    saves=None,
    limits={
        "x.K": (1, 1 << 20, "be [B, L, H, K] with K at least 1"),
        "anchors.P": (1, 1 << 20, "be [H, P, K] with P at least 1"),
    },
    empty="B L H F",
    batch="B",
    shards=("B",),
    autocast=False,
    flops=_flops,
)


def kernel_hash(x: torch.Tensor, anchors: torch.Tensor, mean: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """EcoFormer's kernelised hashing, before the sign: ``A (exp(-|x - anchor|^2 / 2 sigma) - mean)``.

    Args:
        x: [B, L, H, K] float32, bfloat16 or float16, a last stride of 1: batch, tokens, heads, head dim.
        anchors: [H, P, K], mean: [H, P], projection: A, [H, F, P]; float32. P anchors, F bits.

    Returns:
        [B, L, H, F] in the dtype of x; its signs are the codes, as bits by :func:`effvit.ops.sign_bits`. sigma is the
        mean squared distance over the tokens and anchors of an image and a head: results depend on all of its tokens.
        Products and sums in float64, the exponential in float32; differentiable in every argument.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype. ValueError: a shape or stride is
        outside the above. The message names the argument.

    Source: EcoFormer (arXiv:2209.09004).
    """
    return OP(x, anchors, mean, projection)
