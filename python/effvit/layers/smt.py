"""SMT: scale-aware modulation, heads of depthwise convolutions of growing size that modulate the values."""

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import softmax_attention
from ._tokens import as_map, as_tokens, convolve, head_dim


class ScaleAwareModulation(nn.Module):
    """SMT's attention (arXiv:2307.08579): the arguments and the state_dict of the original (there `Attention`).

    x [B, H*W, dim], H, W -> [B, H*W, dim]. Head i of `ca_num_heads` convolves its channels of s(x) depthwise with
    kernel 3 + 2i (multi-head mixed convolution); channel c of all heads, a group, goes through a grouped 1x1
    convolution to `expand_ratio` times as many channels, BatchNorm, GELU and a 1x1 convolution over all (scale-aware
    aggregation)::

        proj(proj1(gelu(bn(proj0(heads)))) * v(x))

    `ca_attention=0`, for the late stages, is softmax attention of `sa_num_heads` heads plus a depthwise 3x3 of the
    values.

    Compared with AFeng-x/SMT, models/smt.py at 11e954d. Differences: weights have PyTorch's initialisation, and the
    modulator is not kept.
    """

    def __init__(
        self, dim, ca_num_heads=4, sa_num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0,
        ca_attention=1, expand_ratio=2, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.ca_attention = ca_attention
        self.dim = dim
        self.ca_num_heads = ca_num_heads
        self.sa_num_heads = sa_num_heads
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if ca_attention == 1:
            groups = head_dim(self, dim, ca_num_heads)
            self.v = nn.Linear(dim, dim, bias=qkv_bias, **factory)
            self.s = nn.Linear(dim, dim, bias=qkv_bias, **factory)
            for i in range(ca_num_heads):
                conv = nn.Conv2d(groups, groups, 3 + 2 * i, padding=1 + i, groups=groups, **factory)
                setattr(self, f"local_conv_{i + 1}", conv)
            self.proj0 = nn.Conv2d(dim, dim * expand_ratio, 1, groups=groups, **factory)
            self.bn = nn.BatchNorm2d(dim * expand_ratio, **factory)
            self.proj1 = nn.Conv2d(dim * expand_ratio, dim, 1, **factory)
        else:
            size = head_dim(self, dim, sa_num_heads)
            self.scale = qk_scale or size**-0.5
            self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
            self.attn_drop = nn.Dropout(attn_drop)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
            self.local_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)

    def forward(self, x, H, W):
        out = self._modulate(x, (H, W)) if self.ca_attention == 1 else self._attend(x, (H, W))
        return self.proj_drop(self.proj(out))

    def _modulate(self, x, size):
        heads = as_map(self.s(x), size).chunk(self.ca_num_heads, dim=1)
        heads = [convolve(getattr(self, f"local_conv_{i + 1}"), t) for i, t in enumerate(heads)]
        groups = torch.stack(heads, dim=2).flatten(1, 2)  # channel c of every head side by side
        modulator = convolve(self.proj1, F.gelu(self.bn(convolve(self.proj0, groups))))
        return as_tokens(modulator) * self.v(x)

    def _attend(self, x, size):
        q = self.q(x).unflatten(-1, (self.sa_num_heads, -1)).transpose(1, 2)
        kv = self.kv(x)
        k, v = kv.unflatten(-1, (2, self.sa_num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        p = self.attn_drop.p if self.training else 0.0
        out = softmax_attention(q, k, v, dropout_p=p, scale=self.scale).transpose(1, 2).flatten(2)
        return out + as_tokens(convolve(self.local_conv, as_map(kv[..., self.dim :], size)))

    def extra_repr(self):
        heads = self.ca_num_heads if self.ca_attention == 1 else self.sa_num_heads
        return f"dim={self.dim}, heads={heads}, ca_attention={self.ca_attention}"
