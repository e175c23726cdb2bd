"""Operators on tensors that are split across the ranks of a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives

from .ops._checks import index_of, type_error, value_error
from .ops.linear_attention import FEATURE_MAPS, NORMALIZERS, OP

__all__ = ["sequence_parallel_linear_attention"]


class _Sum(torch.autograd.Function):
    """Sum over the ranks; what every rank does with it flows back to each: again a sum over the ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.group), None


def _of_all_ranks(x, group):  # [ranks, *x.shape]
    return collectives.wait_tensor(collectives.all_gather_tensor(x[None].contiguous(), 0, group))


class _SumOfOtherRanks(torch.autograd.Function):
    """Sum over the lower ranks, in their order, or over the higher ones: each is the other's derivative."""

    @staticmethod
    def forward(ctx, x, group, lower):
        ctx.group, ctx.lower = group, lower
        every, rank = _of_all_ranks(x, group), dist.get_rank(group)
        return (every[:rank] if lower else every[rank + 1 :]).sum(0)

    @staticmethod
    def backward(ctx, grad):
        return _SumOfOtherRanks.apply(grad, ctx.group, not ctx.lower), None, None


def _process_group(op, group):
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"effvit::{op}: torch.distributed must be initialised, got no process group")
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            raise value_error(op, "group", "a mesh of one dimension", f"{group.ndim}")
        return group.get_group()
    if group is None:
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise type_error(op, "group", "a ProcessGroup, a DeviceMesh or None", type(group).__name__)
    return group


def sequence_parallel_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: dist.ProcessGroup | dist.DeviceMesh | None = None,
    q_den: torch.Tensor | None = None,
    k_den: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    *,
    feature_map: str = "relu",
    normalize: str = "sum",
    eps: float = 1e-6,
    clamp_min: float = 0.0,
    scale: float = 1.0,
    causal: bool = False,
) -> torch.Tensor:
    """effvit.linear_attention over sequences of which every rank holds a part.

    Every rank sums the states of its own keys; one all-reduce of S and z (float32, B*H*K*(V+1) numbers, whatever the
    length) gives all ranks the whole, from which each computes the output of its own queries. The backward communicates
    the same once. With ``causal=True`` the parts follow each other in the order of the ranks, and an all-gather takes
    the place of the all-reduce.

    Args:
        q, k, v, q_den, k_den, weight: this rank's part, as effvit.linear_attention takes them. The lengths may differ
            from rank to rank and be 0; everything else must be the same on all ranks.
        group: the ranks that share the sequences; all if None.
        feature_map, normalize, eps, clamp_min, scale: as in effvit.linear_attention; "mean" counts the keys of all
            ranks.
        causal: every query sees the keys of lower ranks and its own rank's up to its own. Not with "mean".

    Returns:
        ``out`` [B, L, H, V] of this rank's queries, in the dtype of q; differentiable in every tensor argument by
        autograd. Gradients are those of the sum of all ranks' losses.

    Works under autocast and torch.compile. Deterministic where the backend's all-reduce is.

    Raises:
        TypeError, ValueError: as effvit.linear_attention, on the ranks where the arguments are wrong; before any
            communication.
        RuntimeError: torch.distributed is not initialised.
    """
    op = "sequence_parallel_linear_attention"
    options = {
        "feature_map": index_of(op, "feature_map", feature_map, FEATURE_MAPS),
        "normalize": index_of(op, "normalize", normalize, NORMALIZERS),
        "eps": eps, "clamp_min": clamp_min, "scale": scale, "causal": causal,
    }  # fmt: skip
    if not torch.compiler.is_compiling():  # there the operator's fake kernel validates
        options = OP.named(op).validate(q, k, v, q_den, k_den, weight, **options)
    if causal and normalize == "mean":
        raise value_error(op, "normalize", "none, sum or clamp when causal is True", normalize)
    group = _process_group(op, group)
    linear_attention = torch.ops.effvit.linear_attention.default
    B, _, H, K = q.shape
    V = v.shape[3]

    # Fresh empty tensors, not slices: the backward of a slice is a full tensor of zeros.
    no_queries = q.new_empty(B, 0, H, K)
    _, state, z = linear_attention(no_queries, k, v, None, k_den, weight, **options | {"causal": False})
    packed = torch.cat((state.flatten(1), z.flatten(1)), 1)  # [B, H*K*V + H*K]
    if causal:
        before = _SumOfOtherRanks.apply(packed, group, True)
    elif normalize == "mean":
        count = packed.new_full((B, 1), k.shape[1])
        before = _Sum.apply(torch.cat((packed, count), 1), group)
        # S/n over z/n + eps: the call below has no keys to count
        before = before[:, :-1] / before[:, -1:].detach()
        options["normalize"] = NORMALIZERS.index("sum")
    else:
        before = _Sum.apply(packed, group)
    state, z = before.split((H * K * V, H * K), 1)
    state, z = state.unflatten(1, (H, K, V)), z.unflatten(1, (H, K))
    if causal:
        out, _, _ = linear_attention(q, k, v, q_den, k_den, weight, None, state, z, **options)
    else:
        no_keys, no_values = k.new_empty(B, 0, H, K), v.new_empty(B, 0, H, V)
        out, _, _ = linear_attention(q, no_keys, no_values, q_den, None, None, None, state, z, **options)
    return out
