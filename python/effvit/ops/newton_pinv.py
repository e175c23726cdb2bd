"""newton_pinv: schema, validation, fake kernel, autograd, autocast, vmap, sharding, and the public function."""

from __future__ import annotations

import torch

from ..reference.newton_pinv import newton_pinv as _reference
from . import _registry as R

NAME = "newton_pinv"
SCHEMA = f"{NAME}(Tensor a, *, int iterations=20, float ridge=0.01, float step=1.8) -> Tensor out"
SCHEMA_BACKWARD = f"{NAME}_backward(Tensor grad_out, Tensor out) -> Tensor da"
MAX_SIZE = 256
MAX_ITERATIONS = 1000


# ---- validation ----------------------------------------------------------------------------------------------------


def _check_matrices(op, name, t):
    R.check_tensor(op, name, t)
    if t.dim() != 4 or t.shape[2] != t.shape[3] or not 1 <= t.shape[3] <= MAX_SIZE:
        raise R.value_error(op, name, f"[B, H, m, m] with m between 1 and {MAX_SIZE}", R.shape(t))
    R.check_float(op, name, t)


def _validate(a, *, iterations=20, ridge=0.01, step=1.8):
    """Raise on anything the op does not take; return the keywords as plain numbers."""
    _check_matrices(NAME, "a", a)
    R.check_last_stride(NAME, "a", a)
    if not R.is_int(iterations):
        raise R.type_error(NAME, "iterations", "an int", repr(iterations))
    iterations = int(iterations)
    if not 0 <= iterations <= MAX_ITERATIONS:
        raise R.value_error(NAME, "iterations", f"between 0 and {MAX_ITERATIONS}", iterations)
    ridge = R.as_finite(NAME, "ridge", ridge)
    if ridge < 0:
        raise R.value_error(NAME, "ridge", "at least 0", ridge)
    step = R.as_positive(NAME, "step", step)
    return {"iterations": iterations, "ridge": ridge, "step": step}


def _validate_backward(grad_out, out):
    op = f"{NAME}_backward"
    _check_matrices(op, "out", out)
    R.check_tensor(op, "grad_out", grad_out)
    R.check_shape(op, "grad_out", grad_out, "[B, H, m, m]", out.shape)
    R.check_like(op, "grad_out", grad_out, "out", out)
    R.check_last_stride(op, "grad_out", grad_out)
    if not out.is_contiguous():
        raise R.value_error(op, "out", "contiguous as the forward returned it", f"strides {tuple(out.stride())}")


# ---- reference and fake kernels ------------------------------------------------------------------------------------


def _reference_forward(a, **keywords):
    return _reference(a.detach(), **keywords).contiguous()


def _reference_backward(grad_out, out):
    vt = out.float().mT
    return -(vt @ grad_out.float() @ vt).to(out.dtype).contiguous()


def _fake_forward(a, **keywords):
    return a.new_empty(a.shape)


def _fake_backward(grad_out, out):
    return out.new_empty(out.shape)


R.define_op(NAME, SCHEMA, reference=_reference_forward, validate=_validate, fake=_fake_forward)
R.define_op(
    f"{NAME}_backward", SCHEMA_BACKWARD,
    reference=_reference_backward, validate=_validate_backward, fake=_fake_backward, backward_of=NAME,
)  # fmt: skip


# ---- autograd ------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(output)


def _backward(ctx, grad_out):
    (out,) = ctx.saved_tensors
    if grad_out.shape[-1] > 1 and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    return torch.ops.effvit.newton_pinv_backward(grad_out, out)


torch.library.register_autograd(f"effvit::{NAME}", _backward, setup_context=_setup_context, lib=R.LIBRARY)


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "effvit::newton_pinv_backward is not differentiable: for second derivatives differentiate torch.linalg.inv"
    )


torch.library.register_autograd(f"effvit::{NAME}_backward", _no_double_backward, lib=R.LIBRARY)


# ---- autocast, vmap, sharding --------------------------------------------------------------------------------------


# An inverse keeps the dtype that it is given; the rule keeps autocast away from the products of the reference.
R.register_autocast(NAME, lambda dtype, a: (a,))
R.vmap_by_folding(NAME, foldable=(0,))
R.vmap_by_folding(f"{NAME}_backward", foldable=(0, 1))


def _register_sharding():
    """DTensor: shard the batch or the heads."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    placements = (Replicate(), Shard(0), Shard(1))

    @register_sharding(torch.ops.effvit.newton_pinv.default)
    def forward_rule(a, *, iterations=20, ridge=0.01, step=1.8):
        return [([p], [p]) for p in placements]

    @register_sharding(torch.ops.effvit.newton_pinv_backward.default)
    def backward_rule(grad_out, out):
        return [([p], [p, p]) for p in placements]


if torch.distributed.is_available():
    _register_sharding()


# ---- the public function -------------------------------------------------------------------------------------------


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

    Differentiable (once) in a by the derivative of the inverse, ``da = -V^T dV V^T``, from V alone: exact where the
    iteration has converged; where it has not, it is the derivative at the inverse's approximation and not that of the
    steps. Deterministic; results do not depend on the number of threads. Autocast leaves it alone: it computes in the
    dtype that it is given.

    Raises:
        TypeError: a is not a dense tensor or has the wrong dtype; a number is not a number.
        ValueError: a shape, stride or value is outside the above. The message names the argument.
    """
    keywords = _validate(a, iterations=iterations, ridge=ridge, step=step)
    return torch.ops.effvit.newton_pinv(a, **keywords)
