"""local_pool_attention: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.local_pool_attention import local_pool_attention as _reference
from ._op import op


def _derive(op, dims, options, tensors):
    if options["window"] % 2 == 0:
        raise ValueError(f"effvit::{op}: window must be odd, got {options['window']}")
    dims["T"] = options["window"] ** 2


def _flops(dims, options):
    """Products only: scores and the sum of the values; backward five of each."""
    queries = dims["B"] * dims["H"] * dims["W"] * dims["h"]
    product = 2 * queries * dims["d"] * (dims["T"] + dims["P"])
    return 2 * product, 5 * product


OP = op(
    "local_pool_attention",
    """q: B H W h d, k: B H W h d, v: B H W h d, k_pool: B P h d, v_pool: B P h d, local_bias?: h T | float32 packed,
    pool_bias?: h H*W P | float32 packed, q_scale?: h H*W | float32 packed, q_embed?: h d | float32 packed,
    tokens?: h d T | float32 packed, token_bias?: h T | float32 packed -> out: B H W h d""",
    "window: int in 3..7 = 3",
    reference=_reference,
    limits={"q.d": (1, 256, "be a tensor with a head dim between 1 and 256")},
    derive=_derive,
    empty="B H W h",
    shards=("B", "h"),
    flops=_flops,
)


def local_pool_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    local_bias: torch.Tensor | None = None,
    pool_bias: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    q_embed: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    token_bias: torch.Tensor | None = None,
    *,
    window: int = 3,
) -> torch.Tensor:
    r"""Attention to the window around a position and to pooled tokens, one softmax over both, as in TransNeXt.

    For every position and head, with s = (q + q_embed) * q_scale::

        [a, b] = softmax([s k_j + local_bias_j for j in the window, s k_pool_p + pool_bias_p for all p])
        out = sum_j (a_j + q tokens_j + token_bias_j) v_j + sum_p b_p v_pool_p

    Positions of the window outside of the map have no part in the softmax. Nothing with an entry for every position and
    key is written to memory, in the backward neither, which computes the weights again.

    Args:
        q: [B, H, W, h, d]: batch, map, heads, head dim; d from 1 to 256. No scale is applied but q_scale.
        k, v: [B, H, W, h, d].
        k_pool, v_pool: [B, P, h, d]: pooled tokens, any number of them.
            All float32, bfloat16 or float16 (one dtype), any strides with a last stride of 1.
        local_bias: [h, window^2], row by row of the window; this and all that follow in float32.
        pool_bias: [h, H*W, P].
        q_scale: [h, H*W]; TransNeXt's temperature and logarithm of the number of keys.
        q_embed: [h, d]; TransNeXt's query embedding.
        tokens: [h, d, window^2]; TransNeXt's learnable tokens, multiplied with q as given.
        token_bias: [h, window^2].
        window: 3, 5 or 7.

    Returns:
        [B, H, W, h, d] in the dtype of q, contiguous; differentiable in every tensor. Computed in float32.
        Deterministic; results do not depend on the number of threads. Under autocast maps and pooled tokens are cast.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; window is not an integer.
        ValueError: a shape, stride, device or window is outside the above. The message names the argument.

    Source: Shi, TransNeXt (arXiv:2311.17132).
    """
    return OP(
        q, k, v, k_pool, v_pool, local_bias, pool_bias, q_scale, q_embed, tokens, token_bias, window=window
    )  # fmt: skip
