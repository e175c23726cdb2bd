"""TCNCA: MEGA's gated attention in chunks, with a temporal convolution network in place of the moving average."""

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import dwconv_tokens, softmax_attention


class TemporalConvolutions(nn.Module):
    """`depth` depthwise convolutions of growing dilation, each with silu and a residual: tokens [B, L, dim]."""

    def __init__(self, dim, kernel_size, dilation, depth, causal, device=None, dtype=None):
        super().__init__()
        self.causal = causal
        self.convs = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel_size, dilation=dilation**i, groups=dim, device=device, dtype=dtype)
            for i in range(depth)
        )

    def forward(self, x):
        for conv in self.convs:
            dilation = conv.dilation[0]
            x = x + dwconv_tokens(x, conv.weight, conv.bias, causal=self.causal, dilation=dilation, act="silu")
        return x


class RelativePositionalBias(nn.Module):
    """MEGA's simple relative position bias: a number for every difference of positions."""

    def __init__(self, max_positions, device=None, dtype=None):
        super().__init__()
        self.max_positions = max_positions
        self.rel_pos_bias = nn.Parameter(torch.empty(2 * max_positions - 1, device=device, dtype=dtype))
        nn.init.normal_(self.rel_pos_bias, std=0.02)

    def forward(self, length):
        """[length, length]: entry (i, j) belongs to j - i."""
        if length > self.max_positions:
            raise ValueError(
                f"effvit::TCNCA: x must have at most max_positions {self.max_positions} tokens, got {length}"
            )
        positions = torch.arange(length, device=self.rel_pos_bias.device)
        return self.rel_pos_bias[positions - positions.unsqueeze(1) + self.max_positions - 1]


class TCNCA(nn.Module):
    """TCNCA's layer (arXiv:2312.05605): gated attention in chunks behind a temporal convolution network (TCN).

    x [B, L, embed_dim] -> the same shape. With y = LayerNorm(x), m = TCN(y)::

        (u, z, r, h) = mx_proj(m),    v = silu(v_proj(y))
        q = silu(z) gamma_0 + beta_0,    k = silu(z) gamma_1 + beta_1
        a = softmax(q k^T / sqrt(zdim) + bias) v, within each chunk
        out = x + sigmoid(u) (silu(h + h_proj(a * silu(r))) - x)

    The TCN has `depth` depthwise convolutions of `kernel_size`, number i with dilation `dilation`^i: it sees
    1 + (kernel_size - 1) (dilation^depth - 1) / (dilation - 1) tokens at a cost linear in L, where MEGA has an
    exponential moving average computed by FFT. `chunk_size` < 0 is attention over all tokens; the last chunk may be
    shorter than the others. Causal, or with `bidirectional=True` neither the attention within a chunk nor the
    convolutions are: the latter then look to both sides, which needs an odd kernel_size.

    The paper publishes no code. Gates, attention, bias and the names of parameters but `move` are those of MEGA
    (arXiv:2209.10655; compared with facebookresearch/mega, fairseq/modules/moving_average_gated_attention.py at
    aeaa4b4, with attention_activation="softmax" and tokens in the second dimension); silu and residual around each
    convolution are ours.
    """

    def __init__(
        self, embed_dim, zdim, hdim, kernel_size=3, dilation=2, depth=4, dropout=0.0, attention_dropout=0.0,
        hidden_dropout=0.0, bidirectional=False, chunk_size=-1, prenorm=True, max_positions=1024, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        for name, ok, expected, got in (
            ("chunk_size", chunk_size != 0, ">= 1, or negative for none", chunk_size),
            ("kernel_size", kernel_size % 2 == 1 or not bidirectional, "odd with bidirectional", kernel_size),
            ("dilation", dilation >= 1, ">= 1", dilation),
        ):
            if not ok:
                raise ValueError(f"effvit::TCNCA: {name} must be {expected}, got {got}")
        self.embed_dim = embed_dim
        self.zdim = zdim
        self.hdim = hdim
        self.chunk_size = chunk_size
        self.bidirectional = bidirectional
        self.prenorm = prenorm
        self.attention_dropout = attention_dropout
        self.dropout = nn.Dropout(dropout)
        self.hidden_dropout = nn.Dropout(hidden_dropout)
        self.norm = nn.LayerNorm(embed_dim, **factory)
        self.move = TemporalConvolutions(embed_dim, kernel_size, dilation, depth, not bidirectional, **factory)
        self.v_proj = nn.Linear(embed_dim, hdim, **factory)
        self.mx_proj = nn.Linear(embed_dim, zdim + hdim + 2 * embed_dim, **factory)
        self.h_proj = nn.Linear(hdim, embed_dim, **factory)
        self.gamma = nn.Parameter(torch.empty(2, zdim, **factory))
        self.beta = nn.Parameter(torch.zeros(2, zdim, **factory))
        self.rel_pos_bias = RelativePositionalBias(max_positions if chunk_size < 0 else chunk_size, **factory)
        for layer in (self.v_proj, self.mx_proj, self.h_proj):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.gamma, std=0.02)

    def forward(self, x):
        y = self.norm(x) if self.prenorm else x
        v = self.hidden_dropout(F.silu(self.v_proj(y)))
        mixed = self.mx_proj(self.dropout(self.move(y)))
        u, zr, h = mixed.split([self.embed_dim, self.zdim + self.hdim, self.embed_dim], dim=-1)
        z, r = F.silu(zr).split([self.zdim, self.hdim], dim=-1)
        q, k = (z.unsqueeze(2) * self.gamma + self.beta).unbind(2)
        h = F.silu(h + self.h_proj(self._attend(q, k, v.to(q.dtype)) * r))
        out = torch.addcmul(x, torch.sigmoid(u), self.dropout(h) - x)
        return out if self.prenorm else self.norm(out)

    def _attend(self, q, k, v):
        """q and k [B, L, zdim], v [B, L, hdim] -> [B, L, hdim], chunk by chunk."""
        L = q.shape[1]
        if self.chunk_size < 0 or L <= self.chunk_size:
            return self._attend_chunks(*(t.unsqueeze(1) for t in (q, k, v))).flatten(1, 2)
        whole = L // self.chunk_size * self.chunk_size
        chunks = (t[:, :whole].unflatten(1, (-1, self.chunk_size)) for t in (q, k, v))
        parts = [self._attend_chunks(*chunks).flatten(1, 2)]
        if whole < L:
            parts.append(self._attend_chunks(*(t[:, None, whole:] for t in (q, k, v))).flatten(1, 2))
        return torch.cat(parts, dim=1)

    def _attend_chunks(self, q, k, v):
        """[B, chunks, size, d] each."""
        bias = self.rel_pos_bias(q.shape[2]).to(q.dtype)
        if not self.bidirectional:
            later = torch.ones(bias.shape, dtype=torch.bool, device=bias.device).triu(1)
            bias = bias.masked_fill(later, -torch.inf)
        p = self.attention_dropout if self.training else 0.0
        return softmax_attention(q, k, v, attn_mask=bias, dropout_p=p)

    def extra_repr(self):
        return (
            f"embed_dim={self.embed_dim}, zdim={self.zdim}, hdim={self.hdim}, chunk_size={self.chunk_size}, "
            f"bidirectional={self.bidirectional}"
        )
