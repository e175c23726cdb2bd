"""Gated attention written down plainly, for the tests of layers: token after token, all pairs, causal convolutions."""

import torch
import torch.nn.functional as F
from layer_suite import spread


def wide(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))


def recurrence(q, k, v, g):
    """S_t = exp(g_t) S_(t-1) + k_t^T v_t, o_t = q_t S_t: q, k and g [B, h, L, K], v [B, h, L, V]."""
    state = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=v.dtype)
    outs = []
    for t in range(q.shape[2]):
        state = g[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append((q[:, :, t, :, None] * state).sum(2))
    return torch.stack(outs, dim=2)


def pairs(q, k, v, g):
    """The same with the scores of all pairs: decays from differences of running sums."""
    L, b = q.shape[2], g.cumsum(2)
    later = torch.ones(L, L).triu(1).bool()[..., None]
    decay = (b[:, :, :, None] - b[:, :, None]).masked_fill(later, -torch.inf).exp()
    return torch.einsum("bhik,bhjk,bhijk->bhij", q, k, decay) @ v


def pairs_reversed(q, k, v, g):
    """The same with sums over channels and over tokens from the last to the first."""
    reverse = lambda t: t.flip(2, 3)
    L, b = q.shape[2], g.cumsum(2)
    later = torch.ones(L, L).triu(1).bool()[..., None]
    decay = (b[:, :, :, None] - b[:, :, None]).masked_fill(later, -torch.inf).exp().flip(2, 3, 4)
    return (torch.einsum("bhik,bhjk,bhijk->bhij", reverse(q), reverse(k), decay) @ reverse(v)).flip(2, 3)


def attend(scan, q, k, v, g, bidirectional=False):
    """One direction, or both with every token's own term once."""
    g = g.expand_as(k)
    if not bidirectional:
        return scan(q, k, v, g)
    back = scan(*(t.flip(2) for t in (q, k, v, g))).flip(2)
    return scan(q, k, v, g) + back - (q * k).sum(-1, keepdim=True) * v


def convolved(conv, x, causal=True):
    """A depthwise nn.Conv1d of tokens [B, L, C], written out."""
    B, L, C = x.shape
    size, step = conv.kernel_size[0], conv.dilation[0]
    reach = (size - 1) * step
    before = reach if causal else reach // 2
    windows = F.pad(x, (0, 0, before, reach - before)).unfold(1, reach + 1, 1)[..., ::step]  # [B, L, C, size]
    y = (windows * spread(conv, "weight", (B, L, C, 1, size)).squeeze(3)).sum(-1)
    return y if conv.bias is None else y + spread(conv, "bias", y.shape)


def silu(x):
    return x * x.sigmoid()
