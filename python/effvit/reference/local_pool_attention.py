"""local_pool_attention in readable PyTorch: the definition."""

import torch
import torch.nn.functional as F


def _around(t: torch.Tensor, window: int) -> torch.Tensor:
    """[B, H, W, h, d] -> the window around every position, [B, H, W, h, window^2, d], zeros outside of the map."""
    H, W, r = *t.shape[1:3], window // 2
    padded = F.pad(t, (0, 0, 0, 0, r, r, r, r))
    return torch.stack([padded[:, i : i + H, j : j + W] for i in range(window) for j in range(window)], -2)


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
    drop=None,
) -> torch.Tensor:
    """One softmax over the window around a position and all pooled tokens: q, k, v [B, H, W, h, d] -> the same.

    Scores are those of (q + q_embed) * q_scale. q tokens + token_bias is added to the weights of the window afterwards.
    drop: what dropout makes of the weights [B, H, W, h, window^2 + P] before; for layers.
    """
    H, W, h = q.shape[1:4]
    given = q
    if q_embed is not None:
        q = q + q_embed.to(q.dtype)
    if q_scale is not None:
        q = q * q_scale.to(q.dtype).view(h, H, W).permute(1, 2, 0).unsqueeze(-1)
    local = (_around(k, window) @ q.unsqueeze(-1)).squeeze(-1)
    pooled = torch.einsum("byxhd,bphd->byxhp", q, k_pool)
    if local_bias is not None:
        local = local + local_bias.to(q.dtype)
    if pool_bias is not None:
        pooled = pooled + pool_bias.to(q.dtype).view(h, H, W, -1).permute(1, 2, 0, 3)
    inside = _around(torch.ones(1, H, W, 1, 1, dtype=q.dtype, device=q.device), window).squeeze(-1) > 0
    scores = torch.cat((local.masked_fill(~inside, -torch.inf), pooled), -1)
    weights = scores.softmax(-1) if drop is None else drop(scores.softmax(-1))
    local, pooled = weights.split((local.shape[-1], pooled.shape[-1]), -1)
    if tokens is not None:
        local = local + torch.einsum("byxhd,hdt->byxht", given, tokens.to(q.dtype))
    if token_bias is not None:
        local = local + token_bias.to(q.dtype)
    out = (local.unsqueeze(-2) @ _around(v, window)).squeeze(-2)
    return out + torch.einsum("byxhp,bphd->byxhd", pooled, v_pool)
