"""DCT-Former: softmax attention among the lowest frequencies of a sequence's cosine transform."""

import math
from contextlib import nullcontext

import torch
from torch import nn

from ._ops import softmax_attention, wide
from ._tokens import head_dim as divided


def dct_matrix(n, m, device=None, dtype=torch.float32):
    """The first m rows of the orthonormal DCT-II of length n, [m, n]; its transpose is the inverse.

    Row k, column i: sqrt(2 / n) cos(pi k (2 i + 1) / 2n), the first row divided by sqrt(2). Computed in float64 from
    angles below 2 pi.
    """
    k, i = torch.arange(m, device=device)[:, None], torch.arange(n, device=device)
    phase = k * (2 * i + 1) % (4 * n)
    norm = (torch.where(k == 0, 1, 2).double() / n).sqrt()
    return (norm * torch.cos(phase.double() * (math.pi / (2 * n)))).to(dtype)


def _apply(matrix, x):
    """matrix [m, n] @ x [.., n, d] in float32 (float64 for float64), rounded to the dtype of x."""
    device = x.device.type
    off = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with off:
        return (matrix @ wide(x)).to(x.dtype)


class DCTAttention(nn.Module):
    """DCT-Former's attention (arXiv:2203.01178): its DCT_MHSA_Naive, or its MultiHeadAttention with DCTAttention.

    x [B, N, emb_dim] -> [B, N, n_heads * head_dim]. With D the first m = min(max_m, N) rows of the orthonormal DCT-II::

        compress="x":    y = D x;  out = fc_o(D^T attention(fc_q(y), fc_k(y), fc_v(y)))
        compress="qkv":  out = fc_o(D^T attention(D fc_q(x), D fc_k(x), D fc_v(x)))

    Attention is that of every head, of m tokens, scaled by 1 / sqrt(head_dim): cost falls from N^2 to m^2 + m N.
    state_dict as there (fc_q, fc_k, fc_v, fc_o). `mask` [B, N], "qkv" alone: keys and values are multiplied with it
    before their transform. `dropout` of the attention weights, "x" alone. The transform is computed in float32.

    ValueError where compress is another word, max_m is below 1, n_heads does not divide emb_dim and head_dim is not
    given, dropout or mask do not go with compress.

    Compared with cscribano/DCT-Former-Public, models/attention at f6b804a. Differences: arguments in place of a
    configuration, and N may be any number (there, a constant where maxN is given).
    """

    def __init__(
        self, emb_dim, n_heads, max_m, head_dim=None, compress="x", dropout=0.0, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        name = "effvit::DCTAttention"
        if compress not in ("x", "qkv"):
            raise ValueError(f"{name}: compress must be 'x' or 'qkv', got {compress!r}")
        if max_m < 1:
            raise ValueError(f"{name}: max_m must be at least 1, got {max_m}")
        if dropout and compress == "qkv":
            raise ValueError(f"{name}: dropout must be 0 with compress='qkv', got {dropout}")
        factory = {"device": device, "dtype": dtype}
        self.n_heads = n_heads
        self.head_dim = head_dim or divided(self, emb_dim, n_heads)
        self.max_m = max_m
        self.compress = compress
        hidden = n_heads * self.head_dim
        self.fc_q = nn.Linear(emb_dim, hidden, **factory)
        self.fc_k = nn.Linear(emb_dim, hidden, **factory)
        self.fc_v = nn.Linear(emb_dim, hidden, **factory)
        self.fc_o = nn.Linear(hidden, hidden, **factory)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        if mask is not None and self.compress == "x":
            raise ValueError("effvit::DCTAttention: mask must be None with compress='x', got a tensor")
        n = x.shape[1]
        if n == 0:
            return self.fc_o(self.fc_v(x))
        matrix = dct_matrix(n, min(self.max_m, n), x.device, wide(x).dtype)
        if self.compress == "x":
            y = _apply(matrix, x)
            q, k, v = self.fc_q(y), self.fc_k(y), self.fc_v(y)
        else:
            q, k, v = self.fc_q(x), self.fc_k(x), self.fc_v(x)
            if mask is not None:
                k, v = (t * mask.to(t.dtype).unsqueeze(-1) for t in (k, v))
            q, k, v = (_apply(matrix, t) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        p = self.dropout.p if self.training else 0.0
        y = softmax_attention(q, k, v, dropout_p=p, scale=self.head_dim**-0.5)
        return self.fc_o(_apply(matrix.mT, y.transpose(1, 2).flatten(2)))

    def extra_repr(self):
        return f"n_heads={self.n_heads}, head_dim={self.head_dim}, max_m={self.max_m}, compress={self.compress!r}"
