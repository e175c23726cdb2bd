"""FLatten's focused linear attention: focused feature maps outside, one fused operator, depthwise convolution of v."""

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import linear_attention
from ._tokens import as_map, as_tokens, convolve, depthwise_over_heads, head_dim, same_padding, tokens_of
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


class _Focused(nn.Module):
    """What the three variants share: parameters, focused attention, and the convolution of v."""

    def _add_focus(self, dim, num_heads, tokens, focusing_factor, kernel_size, factory):
        self.dim = dim
        self.num_heads = num_heads
        self.focusing_factor = focusing_factor
        d = head_dim(self, dim, num_heads)
        padding = same_padding(self, "kernel_size", kernel_size)
        self.dwc = nn.Conv2d(d, d, kernel_size, padding=padding, groups=d, **factory)
        self.scale = nn.Parameter(torch.zeros(1, 1, dim, **factory))
        self.positional_encoding = nn.Parameter(torch.zeros(1, tokens, dim, **factory))

    def _focus(self, q, k, v):
        """q [B, N, C], k and v [B, n, C] -> [B, N, C]."""
        k = (k + self.positional_encoding).to(v.dtype)
        scale = F.softplus(self.scale if self.scale.dtype == torch.float64 else self.scale.float())
        q, k = (focus(t, scale, self.focusing_factor) for t in (q, k))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        return linear_attention(q, k, v, feature_map="none", normalize="mean", eps=1e-6).flatten(2)

    def _local(self, v, size):
        """v [B, H*W, C] -> [B, H*W, C]."""
        return depthwise_over_heads(v.unflatten(-1, (self.num_heads, -1)), self.dwc, size)


class FocusedLinearAttention(_Focused):
    """Focused linear attention of FLatten-Swin, with the original's constructor and state_dict.

    phi(q) (phi(k)^T v), normalised per query, plus a depthwise convolution of v whose weights all heads share. The
    norms in phi run over all heads. x: windows [nW*B, Wh*Ww, C] or maps [B, Wh, Ww, C]; the output has the shape of x.
    The original takes windows to be square; here the convolution sees the window as it is. `mask`, `qk_scale` and
    `attn_drop` are accepted and unused, as in the original.

    Sources: FLatten Transformer (arXiv:2308.00442); compared with LeapLabTHU/FLatten-Transformer,
    models/flatten_swin.py, commit abdb115. Those of FLatten-PVT and FLatten-CSWin are `FocusedLinearAttentionPVT`
    and `FocusedLinearAttentionCSWin`.
    """

    def __init__(
        self, dim, window_size, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0,
        focusing_factor=3, kernel_size=5, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.window_size = pair(window_size)
        tokens = self.window_size[0] * self.window_size[1]
        self._add_focus(dim, num_heads, tokens, focusing_factor, kernel_size, factory)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(tokens_of(self, x, self.window_size)).chunk(3, dim=-1)
        return self.proj_drop(self.proj(self._focus(q, k, v) + self._local(v, self.window_size))).view(x.shape)

    def extra_repr(self):
        return (
            f"dim={self.dim}, window_size={self.window_size}, num_heads={self.num_heads}, "
            f"focusing_factor={self.focusing_factor}"
        )


class FocusedLinearAttentionPVT(_Focused):
    """Focused linear attention of FLatten-PVT and FLatten-PVT-v2 (there too `FocusedLinearAttention`).

    Same constructor, same state_dict, same `forward(x[B, H*W, C], H, W)`. With `sr_ratio` > 1, keys and values are of
    the map reduced by a convolution with that stride and a LayerNorm; with `linear=True` (v2) of the map pooled to
    7 x 7, a 1 x 1 convolution, LayerNorm and GELU. In both cases v is interpolated to the length of x, along the
    sequence, for the depthwise convolution.

    `num_patches` is H * W: the position encoding has num_patches // sr_ratio^2 tokens. A map that gives another number
    of keys is refused (where it has one token, any will do, as in the original). `qk_scale` and `attn_drop` are
    accepted and unused, as in the original.

    Sources: FLatten Transformer (arXiv:2308.00442); compared with LeapLabTHU/FLatten-Transformer, models/flatten_pvt.py
    and models/flatten_pvt_v2.py, commit abdb115. Differences: v2 has `linear` before focusing_factor, which matters to
    positional arguments only; its initialisation is left to the model, which repeats it.
    """

    def __init__(
        self, dim, num_patches, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, sr_ratio=1,
        focusing_factor=3, kernel_size=5, linear=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.sr_ratio = sr_ratio
        self.linear = linear
        if not 1 <= sr_ratio**2 <= num_patches:
            limit = f"at least 1 and at most the root of num_patches {num_patches}"
            raise ValueError(f"effvit::FocusedLinearAttentionPVT: sr_ratio must be {limit}, got {sr_ratio}")
        self._add_focus(dim, num_heads, num_patches // sr_ratio**2, focusing_factor, kernel_size, factory)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if linear:
            self.pool = nn.AdaptiveAvgPool2d(7)
            self.act = nn.GELU()
        if linear or sr_ratio > 1:
            stride = 1 if linear else sr_ratio
            self.sr = nn.Conv2d(dim, dim, stride, stride=stride, **factory)
            self.norm = nn.LayerNorm(dim, **factory)

    def _reduced(self, x, size):
        """x [B, H*W, C] -> what keys and values are made of, [B, n, C]."""
        if self.linear:
            return self.act(self.norm(as_tokens(convolve(self.sr, self.pool(as_map(x, size))))))
        if self.sr_ratio > 1:
            return self.norm(as_tokens(convolve(self.sr, as_map(x, size))))
        return x

    def forward(self, x, H, W):
        x = tokens_of(self, x, (H, W))
        k, v = self.kv(self._reduced(x, (H, W))).chunk(2, dim=-1)
        tokens = self.positional_encoding.shape[1]
        if tokens not in (1, k.shape[1]):
            name = type(self).__name__
            raise ValueError(f"effvit::{name}: H, W must give {tokens} keys, got {H}, {W}, which give {k.shape[1]}")
        out = self._focus(self.q(x), k, v)
        if self.linear or self.sr_ratio > 1:
            v = F.interpolate(v.mT, size=H * W, mode="linear").mT
        return self.proj_drop(self.proj(out + self._local(v, (H, W))))

    def extra_repr(self):
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, sr_ratio={self.sr_ratio}, linear={self.linear}, "
            f"focusing_factor={self.focusing_factor}"
        )


class FocusedLinearAttentionCSWin(_Focused):
    """Focused linear attention of FLatten-CSWin (there too `FocusedLinearAttention`): between the projections.

    Same constructor, same state_dict, same `forward(qkv)`: q, k and v, [3, B, L, dim] or three [B, L, dim], of a map of
    resolution x resolution -> [B, L, dim]. Besides the convolution that all heads share there is one of all channels
    (`get_v`). Stripes narrower than the map, idx 0 or 1 with split_size < resolution, are refused: the original fails
    on them, and its published models attend to whole maps. `dim_out`, `attn_drop`, `proj_drop` and `qk_scale` are
    accepted and unused, as in the original.

    Sources: FLatten Transformer (arXiv:2308.00442); compared with LeapLabTHU/FLatten-Transformer,
    models/flatten_cswin.py, commit abdb115.
    """

    def __init__(
        self, dim, resolution, idx, split_size=7, dim_out=None, num_heads=8, attn_drop=0.0, proj_drop=0.0,
        qk_scale=None, focusing_factor=3, kernel_size=5, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.resolution = resolution
        if idx not in (-1, 0, 1):
            raise ValueError(f"effvit::FocusedLinearAttentionCSWin: idx must be -1, 0 or 1, got {idx}")
        if idx != -1 and split_size != resolution:
            raise ValueError(
                f"effvit::FocusedLinearAttentionCSWin: split_size must be the resolution {resolution}, got {split_size}"
            )
        self._add_focus(dim, num_heads, resolution**2, focusing_factor, kernel_size, factory)
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)

    def forward(self, qkv):
        size = (self.resolution, self.resolution)
        q, k, v = (tokens_of(self, t, size) for t in qkv)
        lepe = as_tokens(convolve(self.get_v, as_map(v, size)))
        return self._focus(q, k, v) + self._local(v, size) + lepe

    def extra_repr(self):
        return (
            f"dim={self.dim}, resolution={self.resolution}, num_heads={self.num_heads}, "
            f"focusing_factor={self.focusing_factor}"
        )
