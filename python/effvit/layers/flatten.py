"""FLatten's focused linear attention: focused feature maps outside, one fused operator, depthwise convolution of v."""

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import linear_attention
from ._tokens import depthwise_over_heads, head_dim, same_padding, tokens_of
from .window_attention import pair


def focus(x, scale, factor):
    """phi(y) = y^factor * |y| / |y^factor| of y = (relu(x) + 1e-6) / scale, norms over the last dimension.

    Computed in float32 (float64 for float64) and returned in the dtype of x. phi is homogeneous, so the power is taken
    of y / |y|: entries of y near 1e-6 would underflow, and large ones overflow.
    """
    y = F.relu(x if x.dtype == torch.float64 else x.float()) + 1e-6
    y = y / scale.to(y.dtype)
    norm = y.norm(dim=-1, keepdim=True)
    power = (y / norm) ** factor
    return (power * (norm / power.norm(dim=-1, keepdim=True))).to(x.dtype)


class FocusedLinearAttention(nn.Module):
    """Focused linear attention of FLatten-Swin, with the original's constructor and state_dict.

    phi(q) (phi(k)^T v), normalised per query, plus a depthwise convolution of v whose weights all heads share. The
    norms in phi run over all heads. x: windows [nW*B, Wh*Ww, C] or maps [B, Wh, Ww, C]; the output has the shape of x.
    The original takes windows to be square; here the convolution sees the window as it is. `mask`, `qk_scale` and
    `attn_drop` are accepted and unused, as in the original.

    Sources: FLatten Transformer (arXiv:2308.00442).
    """

    def __init__(
        self, dim, window_size, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0,
        focusing_factor=3, kernel_size=5, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.window_size = pair(window_size)
        self.num_heads = num_heads
        d = head_dim(self, dim, num_heads)
        self.focusing_factor = focusing_factor
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        padding = same_padding(self, "kernel_size", kernel_size)
        self.dwc = nn.Conv2d(d, d, kernel_size, padding=padding, groups=d, **factory)
        tokens = self.window_size[0] * self.window_size[1]
        self.scale = nn.Parameter(torch.zeros(1, 1, dim, **factory))
        self.positional_encoding = nn.Parameter(torch.zeros(1, tokens, dim, **factory))

    def forward(self, x, mask=None):
        q, k, v = self.qkv(tokens_of(self, x, self.window_size)).chunk(3, dim=-1)
        k = (k + self.positional_encoding).to(v.dtype)
        scale = F.softplus(self.scale if self.scale.dtype == torch.float64 else self.scale.float())
        q, k = (focus(t, scale, self.focusing_factor) for t in (q, k))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        out = linear_attention(q, k, v, feature_map="none", normalize="mean", eps=1e-6).flatten(2)
        return self.proj_drop(self.proj(out + depthwise_over_heads(v, self.dwc, self.window_size))).view(x.shape)

    def extra_repr(self):
        return (
            f"dim={self.dim}, window_size={self.window_size}, num_heads={self.num_heads}, "
            f"focusing_factor={self.focusing_factor}"
        )
