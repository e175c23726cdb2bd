"""rbf_gram: schema, validation, fake kernel, autograd, autocast, vmap, sharding, and the public function."""

from __future__ import annotations

import torch

from ..reference.rbf_gram import rbf_gram as _reference
from . import _registry as R

NAME = "rbf_gram"
SCHEMA = f"{NAME}(Tensor q, Tensor k, *, float gamma=0.5) -> Tensor out"
SCHEMA_BACKWARD = (
    f"{NAME}_backward(Tensor grad_out, Tensor q, Tensor k, Tensor out, *, float gamma=0.5) -> (Tensor dq, Tensor dk)"
)
MAX_HEAD_DIM = 256


# ---- validation ----------------------------------------------------------------------------------------------------


def _validate(op, q, k, *, gamma=0.5):
    """Raise on anything the op does not take; return gamma as a float."""
    for name, t in (("q", q), ("k", k)):
        R.check_tensor(op, name, t)
    if q.dim() != 4:
        raise R.value_error(op, "q", "[B, L, H, D]", R.shape(q))
    R.check_float(op, "q", q)
    if k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise R.value_error(op, "k", f"[B, M, H, D] like q {R.shape(q)}", R.shape(k))
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise R.value_error(op, "q", f"a tensor with a head dim between 1 and {MAX_HEAD_DIM}", R.shape(q))
    for name, t in (("q", q), ("k", k)):
        R.check_like(op, name, t, "q", q)
        R.check_last_stride(op, name, t)
    return R.as_positive(op, "gamma", gamma)


def _validate_forward(q, k, *, gamma=0.5):
    _validate(NAME, q, k, gamma=gamma)


def _validate_backward(grad_out, q, k, out, *, gamma=0.5):
    op = f"{NAME}_backward"
    _validate(op, q, k, gamma=gamma)
    for name, t in (("grad_out", grad_out), ("out", out)):
        R.check_tensor(op, name, t)
        R.check_shape(op, name, t, "[B, H, L, M]", (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
        R.check_like(op, name, t, "q", q)
    R.check_last_stride(op, "grad_out", grad_out)
    if not out.is_contiguous():
        raise R.value_error(op, "out", "contiguous as the forward returned it", f"strides {tuple(out.stride())}")


# ---- reference and fake kernels ------------------------------------------------------------------------------------


def _reference_forward(q, k, *, gamma=0.5):
    return _reference(q, k, gamma=gamma).contiguous()


def _reference_backward(grad_out, q, k, out, *, gamma=0.5):
    p = grad_out.float() * out.float()
    qf, kf = (t.float().transpose(1, 2) for t in (q, k))
    dq = -2 * gamma * (p.sum(-1)[..., None] * qf - p @ kf)
    dk = -2 * gamma * (p.sum(-2)[..., None] * kf - p.mT @ qf)
    return tuple(g.to(q.dtype).transpose(1, 2).contiguous() for g in (dq, dk))


def _fake_forward(q, k, *, gamma=0.5):
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], k.shape[1]))


def _fake_backward(grad_out, q, k, out, *, gamma=0.5):
    return q.new_empty(q.shape), q.new_empty(k.shape)


R.define_op(NAME, SCHEMA, reference=_reference_forward, validate=_validate_forward, fake=_fake_forward)
R.define_op(
    f"{NAME}_backward", SCHEMA_BACKWARD,
    reference=_reference_backward, validate=_validate_backward, fake=_fake_backward, backward_of=NAME,
)  # fmt: skip


# ---- autograd ------------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs, output)
    ctx.gamma = keyword_only_inputs["gamma"]


def _backward(ctx, grad_out):
    q, k, out = ctx.saved_tensors
    if grad_out.shape[-1] > 1 and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    return torch.ops.effvit.rbf_gram_backward(grad_out, q, k, out, gamma=ctx.gamma)


torch.library.register_autograd(f"effvit::{NAME}", _backward, setup_context=_setup_context, lib=R.LIBRARY)


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "effvit::rbf_gram_backward is not differentiable: for second derivatives differentiate "
        "effvit.reference.rbf_gram, which is plain PyTorch"
    )


torch.library.register_autograd(f"effvit::{NAME}_backward", _no_double_backward, lib=R.LIBRARY)


# ---- autocast, vmap, sharding --------------------------------------------------------------------------------------


def _autocast(dtype, q, k):
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in (q, k))


R.register_autocast(NAME, _autocast)
R.vmap_by_folding(NAME, foldable=(0, 1))
R.vmap_by_folding(f"{NAME}_backward", foldable=(0, 1, 2, 3))


def _register_sharding():
    """DTensor: shard the batch, the heads, or the queries (then the gradient of k is a sum over the shards)."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    # placements of q, k, out, and of the gradient of k
    rules = (
        (Replicate(), Replicate(), Replicate(), Replicate()),
        (Shard(0), Shard(0), Shard(0), Shard(0)),
        (Shard(2), Shard(2), Shard(1), Shard(2)),
        (Shard(1), Replicate(), Shard(2), Partial()),
    )

    @register_sharding(torch.ops.effvit.rbf_gram.default)
    def forward_rule(q, k, *, gamma=0.5):
        return [([o], [q_, k_]) for q_, k_, o, _ in rules]

    @register_sharding(torch.ops.effvit.rbf_gram_backward.default)
    def backward_rule(grad_out, q, k, out, *, gamma=0.5):
        return [([q_, dk], [o, q_, k_, o]) for q_, k_, o, dk in rules]


if torch.distributed.is_available():
    _register_sharding()


# ---- the public function -------------------------------------------------------------------------------------------


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
        [B, H, L, M] in the dtype of q, contiguous. Differentiable (once) in q and k; the backward reads the result.

    The distance is computed in float32 as ``|q|^2 + |k|^2 - 2 q.k`` and cut at 0, so its error is that of the norms:
    tokens that lie far from the origin and close together should be centred first. Deterministic; results do not depend
    on the number of threads. Under autocast q and k are cast.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; gamma is not a number.
        ValueError: a shape, stride, device or value is outside the above. The message names the argument.
    """
    gamma = _validate(NAME, q, k, gamma=gamma)
    return torch.ops.effvit.rbf_gram(q, k, gamma=gamma)
