"""block_relu2_attention in readable PyTorch: the definition."""

import torch
import torch.nn.functional as F


def block_relu2_attention(q, k, v, *, group: int = 256, causal: bool = False) -> torch.Tensor:
    """relu(q kᵀ / group)² v within groups of tokens: q, k [B, L, K], v [B, L, V] -> [B, L, V].

    The last group may be short; what is divided by stays `group`. Causal: token i sees tokens up to i of its group.
    """
    L = q.shape[1]
    size = max(min(group, L), 1)
    groups = -(-L // size)
    q, k, v = (F.pad(t, (0, 0, 0, groups * size - L)).unflatten(1, (groups, size)) for t in (q, k, v))
    weights = torch.relu(q @ k.mT / group).square()
    if causal:
        weights = weights.tril()
    return (weights @ v).flatten(1, 2)[:, :L]
