"""sign_bits: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.sign_bits import sign_bits as _definition
from ._op import op


def _derive(op, dims, options, tensors):
    dims["V"] = (dims["K"] + 7) // 8


OP = op(
    "sign_bits",
    "x: ... K, threshold?: ... | float32 strided -> bits: ... V | uint8, scale: ... | float32",
    reference=_definition,
    saves=None,
    derive=_derive,
    empty="...",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=lambda dims, options: (2 * torch.Size(dims["..."]).numel() * dims["K"], 0),  # a comparison, a sum
)


def sign_bits(x: torch.Tensor, threshold: torch.Tensor | None = None):
    """One bit a number, for :func:`effvit.ops.binary_linear`: whether ``x >= 0`` (0 and -0 count as positive), or
    ``x >= threshold``, and the scale that goes with the bits, the best one in the sense of least squares.

    Args:
        x: [..., K] float32, bfloat16 or float16, a last stride of 1, one to six dims.
        threshold: [...] float32, a number for each row; None: 0.

    Returns:
        (bits, scale). bits: uint8 [..., ceil(K / 8)], bit k % 8 of byte k // 8 for number k, zeros beyond K; 0 for NaN.
        scale: float32 [...]. Without a threshold, bits stand for -1 and 1, and it is the mean of |x|: XNOR-Net's. With
        one they stand for 0 and 1, and it is the mean of the x that have their bit set (0 where there is none).
        Deterministic. Layers differentiate with a straight-through estimator of their own: see BinaryLinear.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype. ValueError: it has the wrong shape.

    Sources: XNOR-Net (arXiv:1603.05279); BiViT (arXiv:2211.07091) for attention with a threshold.
    """
    return OP(x, threshold)
