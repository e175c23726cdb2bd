"""newton_pinv: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.newton_pinv import newton_pinv as _reference
from ._op import op

MAX_ITERATIONS = 1000
_MATRICES = "[B, H, m, m] with m between 1 and 256"


def _backward(grad_out, out):
    vt = out.float().mT
    return -(vt @ grad_out.float() @ vt)


def _tangent(op, primals, tangents, results, options):
    v = results[0].float()
    return ((-(v @ tangents["a"].float() @ v)).to(results[0].dtype),)


def _flops(dims, options):
    """Two products a step; backward two."""
    product = 2 * dims["B"] * dims["H"] * dims["m"] ** 3
    row_sums = dims["B"] * dims["H"] * dims["m"] ** 2
    return 2 * product * options.get("iterations", 0) + row_sums, 2 * product


OP = op(
    "newton_pinv",
    "a: B H m m -> out: B H m m",
    f"iterations: int in 0..{MAX_ITERATIONS} = 20, ridge: float >= 0 = 0.01, step: float > 0 = 1.8",
    reference=_reference,
    backward=_backward,
    saves="out",
    saves_inputs=False,
    limits={"a.m": (1, 256, f"be {_MATRICES}")},
    shape=_MATRICES,
    empty="B H",
    shards=("B", "H"),
    autocast=False,  # an inverse keeps the dtype that it is given
    flops=_flops,
    tangent=_tangent,
)


def newton_pinv(a: torch.Tensor, *, iterations: int = 20, ridge: float = 0.01, step: float = 1.8) -> torch.Tensor:
    r"""Inverse of ``P = a + ridge * I`` for many small matrices at once, by Newton-Schulz iteration.

    ``V = alpha * P`` with ``alpha = step / (largest row sum of a)**2``, then `iterations` times ``V = 2V - V P V``. All
    steps of a matrix run in one kernel, without writing V in between. This is the Moore-Penrose inverse of SOFT's
    low-rank attention (arXiv:2110.11945), where a is the [m, m] Gaussian Gram matrix of the bottleneck tokens
    (:func:`effvit.ops.rbf_gram`). SOFT's normalised variant (arXiv:2207.03341) multiplies the result by
    ``rowsum(a)**-0.5`` from both sides.

    Args:
        a: [B, H, m, m], m from 1 to 256; float32, bfloat16 or float16, any strides with a last stride of 1. Meant for
            symmetric positive semidefinite matrices with positive entries, of which the row sum bounds the spectrum;
            others may diverge. A matrix without a positive row sum gives NaN.
        iterations: number of steps, 0 to 1000. The part of V that belongs to the eigenvalue s of P is
            ``(1 - (1 - alpha * s**2) ** (2**iterations)) / s``: eigenvalues that are small beside the largest row sum
            are damped, not inverted.
        ridge: what is added to the diagonal, at least 0; small beside the largest row sum, which does not include it.
        step: numerator of alpha, positive. The iteration converges where ``alpha * s**2 < 2`` for every eigenvalue s.

    Returns:
        [B, H, m, m] in the dtype of a, contiguous. Computed in float32 and rounded once.

    Differentiable in a by the derivative of the inverse, ``da = -V^T dV V^T``, from V alone: exact where the
    iteration has converged; where it has not, it is the derivative at the inverse's approximation and not that of the
    steps. Deterministic; results do not depend on the number of threads. Autocast leaves it alone: it computes in the
    dtype that it is given.

    Raises:
        TypeError: a is not a dense tensor or has the wrong dtype; a number is not a number.
        ValueError: a shape, stride or value is outside the above. The message names the argument.
    """
    return OP(a, iterations=iterations, ridge=ridge, step=step)
