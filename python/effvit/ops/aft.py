"""aft: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.aft import aft as _definition
from ._op import op


def _derive(op, dims, options, tensors):
    """L' means: without a bias they are the same for every query."""
    one = tensors["bias"] is None and dims["L"] != 0
    dims["L'"] = 1 if one else dims["L"]


def _flops(dims, options):
    """The matrix products over pairs of tokens: two; in the backward four, for dk, dv and the bias."""
    elements, queries = dims["B"] * dims["C"], dims["L'"]
    pairs = elements * queries * dims["M"]
    rest = elements * dims["L"]
    return 4 * pairs + 2 * rest, 8 * pairs + 4 * rest


OP = op(
    "aft",
    "q: B L C, k: B M C, v: B M C, bias?: L M | float strided -> "
    "out: B L C, mean: B L' C | float32, lse: B L' C | float32",
    "window: int in 0..2147483647 = 0",
    reference=_definition,
    saves="mean lse",
    limits={"k.M": (1, 1 << 62, "have at least one token")},
    derive=_derive,
    empty="B L C",
    shards=("B", "C"),
    flops=_flops,
)


def aft(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None, *, window: int = 0
) -> torch.Tensor:
    r"""The attention-free transformer's weighted mean, channel by channel:

    ``out_i = sigmoid(q_i) * sum_j exp(k_j + w_ij) v_j / sum_j exp(k_j + w_ij)``.

    AFT-full has a learned bias w for every pair of tokens; as a product of two thin matrices it is made outside, as
    ``a @ b.mT``. AFT-local has w = 0 for |i - j| >= window: such pairs count all the same. AFT-simple has no bias. For
    AFT-conv see `effvit.layers.AFTConv`.

    The weights exp(w_ij) and exp(k_j), each relative to its largest, meet in matrix products. Where that leaves next to
    nothing of a sum, because the largest k and the largest w are far apart, the sum is computed from exp(k_j + w_ij),
    relative to the largest of these: nothing overflows or underflows, whatever k and w. Gradients carry the float32
    rounding of the logarithm of the sum, a relative error of about 6e-8 times that logarithm.

    Args:
        q: [B, L, C].
        k, v: [B, M, C], M at least 1.
            All float32, bfloat16 or float16 (one dtype), any strides with a last stride of 1. k may be -inf.
        bias: [L, M] or None, float32, bfloat16 or float16, any strides. Entries may be -inf: such pairs do not count.
        window: how near tokens are for the bias to hold, in the order of the sequence; 0: all.

    Returns:
        [B, L, C] in the dtype of q, contiguous. Differentiable in all tensors. Computed in float32, deterministic;
        results do not depend on the number of threads. `torch.ops.effvit.aft` also returns the weighted mean and the
        logarithm of the sum of weights, float32, [B, L, C] or, without a bias, [B, 1, C]: the backward reads them.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; an option has the wrong type.
        ValueError: a shape, stride, device or value is outside the above. The message names the argument.

    Source: Zhai et al., An Attention Free Transformer (arXiv:2105.14103).
    """
    return OP(q, k, v, bias, window=window)[0]
