"""Gated linear attention in readable PyTorch, the recurrence itself: what every kernel is tested against.

Differentiable, any floating-point dtype (computes in the dtype of its inputs), any device.
"""

import torch

DIRECTIONS = ("forward", "reverse", "bidirectional")


def gated_linear_attention(
    q, k, v, g_head=None, g_token=None, g_channel=None, cu_seqlens=None, initial_state=None, *, scale=1.0, direction=0
):  # fmt: skip
    """q, k [B, L, H, K], v [B, L, H, V] -> out [B, L, H, V], state [N, H, K, V].

    g_head [H], g_token [B, L, H], g_channel [B, L, H, K], at most one of them: natural logarithms of the decays. The
    other arguments are those of effvit.gated_linear_attention; `direction` is an index into DIRECTIONS. Of both
    directions no state is returned: [N, H, 0, 0].
    """
    decay = decays(q, g_head, g_token, g_channel)
    if cu_seqlens is not None:
        return _by_segment(q, k, v, decay, cu_seqlens.tolist(), initial_state, scale, direction)
    return _of_sequence(q, k, v, decay, initial_state, scale, direction)


def decays(q, g_head, g_token, g_channel):
    """e^g as a factor of a state [..., K, V], for every token: [B, L, H, K, 1], [B, L, H, 1, 1], or [H, 1, 1]."""
    if g_channel is not None:
        return g_channel.to(q.dtype).exp()[..., None]
    g = g_token if g_token is not None else g_head
    return None if g is None else g.to(q.dtype).exp()[..., None, None]


def _of_sequence(q, k, v, decay, state, scale, direction):
    (B, _, H, K), V = q.shape, v.shape[3]
    state = q.new_zeros(B, H, K, V) if state is None else state.to(q.dtype)
    if direction == 2:  # the own token is part of the first sum, and not of the second
        before, last = _scan(q, k, v, decay, state, reverse=False)
        after, _ = _scan(q, k, v, decay, state, reverse=True, own=False)
        return scale * (before + after), last[:, :, :0, :0]
    out, state = _scan(q, k, v, decay, state, reverse=direction == 1)
    return scale * out, state


def _scan(q, k, v, decay, state, reverse, own=True):
    """S = decay S + k^T v, token by token; out = q S, without the token's own k^T v unless `own`."""
    L = q.shape[1]
    tokens = (q[..., None, :], k[..., None], v[..., None, :])
    per_token = decay is not None and decay.dim() == 5
    q, k, v = (x.unbind(1) for x in tokens)
    factors = decay.unbind(1) if per_token else (decay,) * L
    outs = [None] * L
    for t in reversed(range(L)) if reverse else range(L):
        decayed = state if decay is None else factors[t] * state
        state = decayed + k[t] * v[t]
        outs[t] = q[t] @ (state if own else decayed)
    if not outs:
        return (tokens[0] @ (tokens[1] * tokens[2])).squeeze(-2), state
    return torch.stack(outs, 1).squeeze(-2), state


def _by_segment(q, k, v, decay, offsets, initial_state, scale, direction):
    """Segment n holds tokens offsets[n] to offsets[n+1] - 1 of a batch of one; tokens after the last one give zeros."""
    none = k[0, :0, :, :, None] * v[0, :0, :, None]  # of no segment: [0, H, K, V]; part of the graph, like the rest
    outs = [q[:, :0, :, :1] * v[:, :0]]
    states = [none[:, :, :0, :0] if direction == 2 else none]
    for n, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        tokens = (t[:, begin:end] for t in (q, k, v))
        factor = decay[:, begin:end] if decay is not None and decay.dim() == 5 else decay
        initial = None if initial_state is None else initial_state[n : n + 1]
        out, state = _of_sequence(*tokens, factor, initial, scale, direction)
        outs.append(out)
        states.append(state)
    outs.append(v.new_zeros(1, q.shape[1] - offsets[-1], *v.shape[2:]))
    return torch.cat(outs, 1), torch.cat(states)
