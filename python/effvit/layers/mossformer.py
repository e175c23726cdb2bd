"""MossFormer's gated single-head joint attention: squared-ReLU attention in groups, linear attention over all."""

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import apply_state, block_relu2_attention, linear_attention, linear_state


def rotate(x, dims, theta=10000.0):
    """Rotary position encodings of the first `dims` of x [B, L, K], pairs (0, 1), (2, 3), ...; float32 inside."""
    wide = x[..., :dims].to(torch.promote_types(x.dtype, torch.float32))
    angle = torch.arange(x.shape[1], device=x.device, dtype=wide.dtype)[:, None] * (
        theta ** (-torch.arange(0, dims, 2, device=x.device, dtype=wide.dtype) / dims)
    )
    cos, sin = angle.cos(), angle.sin()
    a, b = wide[..., 0::2], wide[..., 1::2]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., dims:]), dim=-1)


class ConvProjection(nn.Module):
    """Norm, linear layer, SiLU, and a depthwise convolution along the sequence beside the identity."""

    def __init__(self, dim_in, dim_out, kernel_size, causal, dropout, norm_layer, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.padding = (kernel_size - 1, 0) if causal else (kernel_size // 2, kernel_size // 2)
        self.norm = norm_layer(dim_in, **factory)
        self.linear = nn.Linear(dim_in, dim_out, **factory)
        self.conv = nn.Conv1d(dim_out, dim_out, kernel_size, groups=dim_out, bias=False, **factory)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = F.silu(self.linear(self.norm(x)))
        return self.dropout(x + self.conv(F.pad(x.mT, self.padding)).mT)


class GatedJointAttention(nn.Module):
    """MossFormer's gated single-head block (arXiv:2302.11824): FLASH's joint attention with convolutions.

    x [B, L, dim] -> [B, L, dim]. Half of the channels come from the token before (`shift_tokens`). With [v, u] and one
    shared z of K = `query_key_dim` channels from projections with convolutions, four scaled and shifted copies of z,
    rotated by their position, are q1, q2, k1, k2, and::

        A = relu(q1 k1^T / g)^2 [v, u] within groups of g tokens  +  q2 (k2^T [v, u]) / L over all tokens
        out = x + W ((A_u * v) * sigmoid(A_v * u))

    `causal=True`: groups see what comes before them, divided by g, instead of all; convolutions look back only. The
    last group may be short. `expansion_factor` times dim channels are v and u together. Dropout follows each
    projection.

    Compared with its formula in plain PyTorch; keys of published checkpoints are others.
    """

    def __init__(
        self, dim, group_size=256, query_key_dim=128, expansion_factor=4.0, causal=False, dropout=0.0, rotary_dim=32,
        shift_tokens=True, kernel_size=17, norm_layer=nn.LayerNorm, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        hidden = int(dim * expansion_factor)
        for name, ok, expected, got in (
            ("dim", dim % 2 == 0 or not shift_tokens, "even with shift_tokens", dim),
            ("expansion_factor", hidden >= 2 and hidden % 2 == 0, "such that dim times it is even", expansion_factor),
            ("group_size", group_size >= 1, ">= 1", group_size),
            ("query_key_dim", 1 <= query_key_dim <= 256, "between 1 and 256", query_key_dim),
            ("kernel_size", kernel_size >= 1 and (causal or kernel_size % 2 == 1), "odd", kernel_size),
        ):
            if not ok:
                raise ValueError(f"effvit::GatedJointAttention: {name} must be {expected}, got {got}")
        factory = {"device": device, "dtype": dtype}
        rest = {"causal": causal, "dropout": dropout, "norm_layer": norm_layer, **factory}
        self.group_size = group_size
        self.causal = causal
        self.shift_tokens = shift_tokens
        self.rotary_dim = min(rotary_dim, query_key_dim) // 2 * 2
        self.to_hidden = ConvProjection(dim, hidden, kernel_size, **rest)
        self.to_qk = ConvProjection(dim, query_key_dim, kernel_size, **rest)
        self.gamma = nn.Parameter(torch.empty(4, query_key_dim, **factory))
        self.beta = nn.Parameter(torch.zeros(4, query_key_dim, **factory))
        self.to_out = ConvProjection(hidden // 2, dim, kernel_size, **rest)
        nn.init.normal_(self.gamma, std=0.02)

    def forward(self, x):
        y = x
        if self.shift_tokens:
            shifted, kept = x.chunk(2, dim=-1)
            y = torch.cat((F.pad(shifted, (0, 0, 1, -1)), kept), dim=-1)
        hidden = self.to_hidden(y)
        v, u = hidden.chunk(2, dim=-1)
        z = self.to_qk(y)
        copies = z[:, None] * self.gamma[:, None] + self.beta[:, None]  # [B, 4, L, K]
        q1, q2, k1, k2 = rotate(copies.flatten(0, 1), self.rotary_dim).unflatten(0, (-1, 4)).unbind(1)
        attended = block_relu2_attention(q1, k1, hidden, group=self.group_size, causal=self.causal)
        attended = attended + (self._before(q2, k2, hidden) if self.causal else self._all(q2, k2, hidden))
        attended_v, attended_u = attended.chunk(2, dim=-1)
        return x + self.to_out((attended_u * v) * torch.sigmoid(attended_v * u))

    @staticmethod
    def _heads(q, k, v):
        """The values in heads of at most 256 columns, queries and keys the same for all: [B, L, h, ...]."""
        heads = -(-v.shape[-1] // 256)
        while v.shape[-1] % heads:
            heads += 1
        q, k = (t[:, :, None].expand(-1, -1, heads, -1) for t in (q, k))
        return q, k, v.unflatten(-1, (heads, -1))

    def _all(self, q, k, v):
        """q (k^T v) / L"""
        out = linear_attention(*self._heads(q / q.shape[1], k, v), feature_map="none", normalize="none")
        return out.flatten(2)

    def _before(self, q, k, v):
        """q (k^T v) / g over the groups before."""
        B, L, g = q.shape[0], q.shape[1], self.group_size
        groups = -(-L // g)
        padded = (F.pad(t, (0, 0, 0, -L % g)).unflatten(1, (groups, g)).flatten(0, 1) for t in (q / g, k, v))
        q, k, v = self._heads(*padded)
        state = linear_state(k, v).unflatten(0, (B, groups))
        state = F.pad(state.cumsum(1), (0, 0, 0, 0, 0, 0, 1, -1))
        return apply_state(q, state.flatten(0, 1)).unflatten(0, (B, groups)).flatten(1, 2).flatten(2)[:, :L]

    def extra_repr(self):
        return f"group_size={self.group_size}, causal={self.causal}, shift_tokens={self.shift_tokens}"
