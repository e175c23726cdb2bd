"""Linear attention, also gated, over sequences that are split across ranks: states travel, tokens do not."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives

from ..ops._checks import as_bool, index_of, value_error
from ..ops.gated_linear_attention import GATES, default_scale, gate_of
from ..ops.gated_linear_attention import OP as GATED_OP
from ..ops.linear_attention import FEATURE_MAPS, NORMALIZERS, OP
from ._ranks import as_autocast, of_all_ranks, process_group

__all__ = ["sequence_parallel_gated_linear_attention", "sequence_parallel_linear_attention"]


class _Sum(torch.autograd.Function):
    """Sum over the ranks; what every rank does with it flows back to each: again a sum over the ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.group), None


class _SumOfOtherRanks(torch.autograd.Function):
    """Sum over the lower ranks, in their order, or over the higher ones: each is the other's derivative."""

    @staticmethod
    def forward(ctx, x, group, lower):
        ctx.group, ctx.lower = group, lower
        every, rank = of_all_ranks(x, group), dist.get_rank(group)
        return (every[:rank] if lower else every[rank + 1 :]).sum(0)

    @staticmethod
    def backward(ctx, grad):
        return _SumOfOtherRanks.apply(grad, ctx.group, not ctx.lower), None, None


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
        autograd. Gradients are those of the sum of all ranks' losses. The backward communicates: all ranks must run
        it, one with an empty part too, and a tensor must require gradients on all ranks or on none.

    Works under autocast and torch.compile. Deterministic where the backend's all-reduce is.

    Raises:
        TypeError, ValueError: as effvit.linear_attention, on the ranks where the arguments are wrong; before any
            communication.
        RuntimeError: torch.distributed is not initialised.
    """
    op = "sequence_parallel_linear_attention"
    q, k, v, q_den, k_den = as_autocast(q, k, v, q_den, k_den)
    options = {
        "feature_map": index_of(op, "feature_map", feature_map, FEATURE_MAPS),
        "normalize": index_of(op, "normalize", normalize, NORMALIZERS),
        "eps": eps, "clamp_min": clamp_min, "scale": scale, "causal": causal,
    }  # fmt: skip
    if not torch.compiler.is_compiling():  # there the operator's fake kernel validates
        options = OP.named(op).validate(q, k, v, q_den, k_den, weight, **options)
    if causal and normalize == "mean":
        raise value_error(op, "normalize", "none, sum or clamp when causal is True", normalize)
    group = process_group(op, group)
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


class _StateBefore(torch.autograd.Function):
    """The state with which a rank starts: S_r = exp(log_decay_(r-1)) S_(r-1) + state_(r-1), 0 on the first rank.

    state [B, H, K, V] and log_decay [B, H, K] are what a rank adds and the logarithm of what it multiplies by; with
    `lower` the ranks before come first, else those after. The gradient of `state` is the same sum in the other
    direction, one all-gather again.
    """

    @staticmethod
    def forward(ctx, state, log_decay, group, lower):
        every = of_all_ranks(torch.cat((state, log_decay.unsqueeze(-1)), -1), group)
        rank = dist.get_rank(group)
        before = torch.zeros_like(state)
        for r in range(rank) if lower else range(every.shape[0] - 1, rank, -1):
            before = every[r, ..., -1:].exp() * before + every[r, ..., :-1]
        ctx.group, ctx.lower = group, lower
        ctx.save_for_backward(log_decay, before)
        return before

    @staticmethod
    def backward(ctx, grad):
        log_decay, before = ctx.saved_tensors
        grad_state = _StateBefore.apply(grad, log_decay, ctx.group, not ctx.lower)
        grad_log_decay = (log_decay.unsqueeze(-1).exp() * before * grad_state).sum(-1)
        return grad_state, grad_log_decay, None, None


def _sums_until_end(g, L, reverse):
    """Sums of gates over the tokens walked after each one, and over all tokens: [B, L, ..] and [B, ..] of float32.

    g [B, L, ..], or [H] for each of L tokens.
    """
    g = g.float().clamp(min=-1000.0)  # -inf too: 0 tokens of it are none
    if g.dim() == 1:
        walked = torch.arange(L, device=g.device, dtype=g.dtype)
        after = walked if reverse else L - 1 - walked
        return (after.unsqueeze(-1) * g).unsqueeze(0), (L * g).unsqueeze(0)
    shifted = torch.cat((torch.zeros_like(g[:, :1]), g), 1)  # no subtraction: it would cancel where gates are strong
    if reverse:
        return shifted[:, :-1].cumsum(1), g.sum(1)
    shifted = torch.cat((g, torch.zeros_like(g[:, :1])), 1)[:, 1:]
    return shifted.flip(1).cumsum(1).flip(1), g.sum(1)


def _own_state(q, k, v, g, reverse):
    """What this rank's tokens add to the state [B, H, K, V] and the logarithm of what they leave of it [B, H, K]."""
    B, L, H, K = k.shape
    after = total = weight = None
    if g is not None:
        after, total = _sums_until_end(g, L, reverse)
        if g.dim() == 4:
            k = (k * after.exp()).to(k.dtype)
        else:
            weight = after.exp().expand(B, L, H)
    none, by_sum = q.new_empty(B, 0, H, K), {"feature_map": 0, "normalize": 0}
    _, state, _ = torch.ops.effvit.linear_attention.default(none, k, v, None, None, weight, **by_sum)
    if total is None:
        return state, state.new_zeros(B, H, K)
    return state, (total if g.dim() == 4 else total.unsqueeze(-1)).expand(B, H, K)


def sequence_parallel_gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    group: dist.ProcessGroup | dist.DeviceMesh | None = None,
    *,
    scale: float | None = None,
    reverse: bool = False,
    bidirectional: bool = False,
) -> torch.Tensor:
    """effvit.gated_linear_attention over sequences of which every rank holds a part, in the order of the ranks.

    Every rank sums the decayed state of its own tokens; one all-gather of state and total decay (float32, B*H*K*(V+1)
    numbers a rank, whatever the length) tells each what the ranks before leave, and it starts from that. The backward
    communicates the same once. Both directions together need two of each.

    Args:
        q, k, v: this rank's tokens, as effvit.gated_linear_attention takes them. The lengths may differ from rank to
            rank and be 0; everything else must be the same on all ranks.
        g: gates of this rank's tokens, [B, L, H] or [B, L, H, K]; or of the heads, [H], the same on all ranks: there
            every rank's gradient is the part of its own tokens. None: no decay.
        group: the ranks that share the sequences; all if None.
        scale, reverse, bidirectional: as in effvit.gated_linear_attention. With ``reverse`` the last rank is the first.

    Returns:
        ``out`` [B, L, H, V] of this rank's tokens, in the dtype of q; differentiable in q, k, v and g by autograd, any
        number of times. Gradients are those of the sum of all ranks' losses. The backward communicates: all ranks must
        run it, one with an empty part too, and a tensor must require gradients on all ranks or on none.

    Works under autocast and torch.compile. Deterministic: states are combined in the order of the ranks.

    Raises:
        TypeError, ValueError: as effvit.gated_linear_attention, on the ranks where the arguments are wrong; before any
            communication.
        RuntimeError: torch.distributed is not initialised.
    """
    op = "sequence_parallel_gated_linear_attention"
    gates = gate_of(op, g, 3, "[H], [B, L, H] or [B, L, H, K]")
    q, k, v, by_channel = as_autocast(q, k, v, gates.get("g_channel"))
    if by_channel is not None:
        g = gates["g_channel"] = by_channel
    gates = [gates.get(name) for name in GATES]
    for option, x in (("reverse", reverse), ("bidirectional", bidirectional)):
        as_bool(op, option, x)
    if reverse and bidirectional:
        raise value_error(op, "reverse", "False when bidirectional is True", reverse)
    options = {"scale": default_scale(q) if scale is None else scale}
    if not torch.compiler.is_compiling():  # there the operator's fake kernel validates
        options = GATED_OP.named(op).validate(q, k, v, *gates, **options)
    group = process_group(op, group)
    outs = []
    for direction in (0, 1) if bidirectional else (int(reverse),):
        state, log_decay = _own_state(q, k, v, g, reverse=direction == 1)
        before = _StateBefore.apply(state, log_decay, group, direction == 0)
        options["direction"] = direction
        outs.append(torch.ops.effvit.gated_linear_attention.default(q, k, v, *gates, None, before, **options)[0])
    if not bidirectional:
        return outs[0]
    forward, backward, queries, k, v = (t.float() for t in (*outs, q, k, v))
    return (forward + backward - options["scale"] * (queries * k).sum(-1, keepdim=True) * v).to(q.dtype)
