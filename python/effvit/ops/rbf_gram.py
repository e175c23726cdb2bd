"""rbf_gram: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.rbf_gram import rbf_gram as _reference
from ._op import op


def _backward(grad_out, q, k, out, *, gamma):
    p = grad_out.float() * out.float()
    qf, kf = (t.float().transpose(1, 2) for t in (q, k))
    dq = -2 * gamma * (p.sum(-1)[..., None] * qf - p @ kf)
    dk = -2 * gamma * (p.sum(-2)[..., None] * kf - p.mT @ qf)
    return dq.transpose(1, 2), dk.transpose(1, 2)


def _flops(dims, options):
    """Matrix products only: q kᵀ; backward P k and Pᵀ q."""
    products = 2 * dims["B"] * dims["H"] * dims["L"] * dims["M"] * dims["D"]
    return products, 2 * products


OP = op(
    "rbf_gram",
    "q: B L H D, k: B M H D -> out: B H L M",
    "gamma: float > 0 = 0.5",
    reference=_reference,
    backward=_backward,
    saves="out",
    limits={"q.D": (1, 256, "be a tensor with a head dim between 1 and 256")},
    empty="B L M H",
    shards=("B", "H", "L"),
    flops=_flops,
)


def rbf_gram(q: torch.Tensor, k: torch.Tensor, *, gamma: float = 0.5) -> torch.Tensor:
    r"""Gram matrix of the Gaussian (RBF) kernel, ``exp(-gamma * |q_i - k_j|^2)`` of every pair of tokens.

    SOFT (arXiv:2110.11945) uses it in place of softmax's exponential of dot products: with gamma = 1/2, queries that
    equal the keys, and q divided by d**0.25 beforehand. There k holds the m bottleneck tokens, and the [L, m] result is
    one factor of the low-rank attention matrix; the [m, m] result of k with itself goes to
    :func:`effvit.ops.newton_pinv`. The normalised variant (arXiv:2207.03341) scales the inverse by the row sums of that
    [m, m] matrix and leaves this function as it is.

    The squared distance and the exponential are one pass: no matrix of dot products or norms is written to memory.

    Args:
        q: [B, L, H, D]: batch, tokens, heads, head dim; D from 1 to 256.
        k: [B, M, H, D].
            Both float32, bfloat16 or float16 (one dtype), any strides with a last stride of 1.
        gamma: inverse squared width of the kernel, finite and positive.

    Returns:
        [B, H, L, M] in the dtype of q, contiguous. Differentiable in q and k; the backward reads the result.

    The distance is computed in float32 as ``|q|^2 + |k|^2 - 2 q.k`` and cut at 0, so its error is that of the norms:
    tokens that lie far from the origin and close together should be centred first. Deterministic; results do not depend
    on the number of threads. Under autocast q and k are cast.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; gamma is not a number.
        ValueError: a shape, stride, device or value is outside the above. The message names the argument.
    """
    return OP(q, k, gamma=gamma)
