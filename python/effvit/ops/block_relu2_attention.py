"""block_relu2_attention: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.block_relu2_attention import block_relu2_attention as _definition
from ._op import op


def _flops(dims, options):
    """Matrix products of the pairs of a group: two; in the backward five."""
    L, K, V, size = dims["L"], dims["K"], dims["V"], options["group"]
    pairs = dims["B"] * (L // size * size * size + (L % size) ** 2)
    return 2 * pairs * (K + V), 2 * pairs * (3 * K + 2 * V)


OP = op(
    "block_relu2_attention",
    "q: B L K, k: B L K, v: B L V -> out: B L V",
    "group: int in 1..1024 = 256, causal: bool = False",
    reference=_definition,
    limits={
        "q.K": (1, 256, "have between 1 and 256 columns"),
        "v.V": (1, 2048, "have between 1 and 2048 columns"),
    },
    empty="B L",
    shards=("B",),
    flops=_flops,
)


def block_relu2_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, group: int = 256, causal: bool = False
) -> torch.Tensor:
    r"""``relu(q kᵀ / group)² v`` within each group of consecutive tokens: the local half of GAU's and MossFormer's
    gated attention.

    The global half is :func:`effvit.linear_attention` with ``feature_map="none", normalize="none"``. No matrix of
    weights is written to memory, in either direction.

    Args:
        q, k: [B, L, K], K from 1 to 256.
        v: [B, L, V], V from 1 to 2048.
            All float32, bfloat16 or float16 (one dtype), any strides with a last stride of 1.
        group: tokens of a group, 1 to 1024. The last group may be short; scores are divided by `group` all the same, as
            in the papers, which pad it with tokens of zeros.
        causal: token i sees the tokens up to i of its group.

    Returns:
        [B, L, V] in the dtype of v, contiguous. Differentiable; sums are float32. Deterministic; results do not depend
        on the number of threads.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; an option has the wrong type.
        ValueError: a shape, stride, device or value is outside the above. The message names the argument.

    Sources: GAU (arXiv:2202.10447, equation 6 within chunks), MossFormer (arXiv:2302.11824).
    """
    return OP(q, k, v, group=group, causal=causal)
