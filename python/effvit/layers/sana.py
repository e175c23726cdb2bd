"""SANA's ReLU linear attention, under the parameter names of its own code (LiteLA) and of diffusers."""

import torch
from torch import nn

from ._ops import linear_attention


def _clip_float16(x):
    """As the originals do: an overflow of the output projection becomes the largest float16."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _normalise(norm, x):
    """norm(x) in the dtype of x, computed in the dtype of the weight: under autocast the two differ."""
    return x if norm is None else norm(x.to(norm.weight.dtype)).to(x.dtype)


class LiteLA(nn.Module):
    """SANA's self-attention with the constructor and the state_dict of its own code.

    x [B, N, C] -> [B, N, C]. With qk_norm, q and k are RMS-normalised over all channels. `mask`, `HW` and `block_id`
    are accepted and unused, as in the original; rotary embeddings (SANA-Video) are not covered.

    Sources: SANA (arXiv:2410.10629).
    """

    def __init__(
        self, in_dim, out_dim, heads=None, heads_ratio=1.0, dim=32, eps=1e-15, use_bias=False, qk_norm=False,
        norm_eps=1e-5, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        heads = heads or int(out_dim // dim * heads_ratio)
        if heads < 1:
            raise ValueError(f"effvit::LiteLA: heads must be >= 1, got {heads}")
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.heads = heads
        self.dim = out_dim // heads
        self.eps = eps
        self.qk_norm = qk_norm
        if in_dim % self.dim:
            raise ValueError(f"effvit::LiteLA: in_dim must be a multiple of the head dim {self.dim}, got {in_dim}")
        self.qkv = nn.Linear(in_dim, 3 * in_dim, bias=use_bias, **factory)
        self.q_norm = nn.RMSNorm(in_dim, eps=norm_eps, **factory) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(in_dim, eps=norm_eps, **factory) if qk_norm else nn.Identity()
        self.proj = nn.Linear(in_dim, in_dim, **factory)

    def forward(self, x, mask=None, HW=None, block_id=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.qk_norm:
            q, k = _normalise(self.q_norm, q), _normalise(self.k_norm, k)
        q, k, v = (t.unflatten(-1, (-1, self.dim)) for t in (q, k, v))
        return _clip_float16(self.proj(linear_attention(q, k, v, eps=self.eps).flatten(2)))

    def extra_repr(self):
        return f"heads={self.heads}, dim={self.dim}, eps={self.eps}"


class SanaLinearAttention(nn.Module):
    """SANA's attention with the parameter names of diffusers' Attention (attn1 of SanaTransformer2DModel).

    hidden_states [B, L, query_dim] -> [B, L, query_dim]; keys and values come from encoder_hidden_states [B, M, .]
    where given. qk_norm is None or "rms_norm_across_heads". `attention_mask` is accepted and unused, as in the
    original.
    """

    def __init__(
        self, query_dim, cross_attention_dim=None, heads=8, dim_head=64, dropout=0.0, bias=False, qk_norm=None,
        out_bias=True, eps=1e-5, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if qk_norm not in (None, "rms_norm_across_heads"):
            raise ValueError(
                f"effvit::SanaLinearAttention: qk_norm must be None or 'rms_norm_across_heads', got {qk_norm!r}"
            )
        factory = {"device": device, "dtype": dtype}
        self.heads = heads
        self.inner_dim = heads * dim_head
        context_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        self.norm_q = nn.RMSNorm(self.inner_dim, eps=eps, **factory) if qk_norm else None
        self.norm_k = nn.RMSNorm(self.inner_dim, eps=eps, **factory) if qk_norm else None
        self.to_q = nn.Linear(query_dim, self.inner_dim, bias=bias, **factory)
        self.to_k = nn.Linear(context_dim, self.inner_dim, bias=bias, **factory)
        self.to_v = nn.Linear(context_dim, self.inner_dim, bias=bias, **factory)
        self.to_out = nn.ModuleList([
            nn.Linear(self.inner_dim, query_dim, bias=out_bias, **factory), nn.Dropout(dropout),
        ])  # fmt: skip

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = self.to_q(hidden_states), self.to_k(context), self.to_v(context)
        q, k = _normalise(self.norm_q, q), _normalise(self.norm_k, k)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        out = linear_attention(q, k, v, eps=1e-15).flatten(2)
        return _clip_float16(self.to_out[1](self.to_out[0](out)))

    def extra_repr(self):
        return f"heads={self.heads}"
