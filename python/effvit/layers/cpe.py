"""Conditional position encodings: PEG of CPVT and Twins, DaViT's ConvPosEnc, and CSWin's attention with LePE."""

import torch
import torch.nn.functional as F
from torch import nn

import effvit.ops

from . import _ops
from ._depthwise import depthwise, depthwise_map, is_operators
from ._ops import dwconv, softmax_attention
from ._tokens import as_map, as_tokens, head_dim, is_hooked, same_padding, tokens_of
from .window_attention import window_merge, window_partition


def _add_convolved(conv, x):
    """x + conv(x) for x [B, H, W, C], in one pass where nothing but a convolution that keeps the size happens."""
    (h, w), (py, px) = conv.kernel_size, conv.padding if is_operators(conv) else (-1, -1)
    keeps = (h, w) == (2 * py + 1, 2 * px + 1) and conv.dilation == (1, 1)
    if not keeps or torch.is_autocast_enabled(x.device.type):  # which would round x as well
        return x + depthwise(conv, x)
    # The tap in the middle takes x along. In float32: a weight of 16 bits would lose its digits beside the 1.
    weight = conv.weight.to(torch.promote_types(conv.weight.dtype, torch.float32))
    middle = F.pad(weight.new_ones(1, 1, 1, 1), (w // 2, w // 2, h // 2, h // 2))
    return dwconv(x, weight + middle, conv.bias, padding=conv.padding)


class PosConv(nn.Module):
    """PEG, the conditional position encoding of CPVT (arXiv:2102.10882), a drop-in for timm's PosConv (Twins).

    x [B, N, in_chans], size (H, W) -> [B, N', embed_dim], tokens plus their depthwise 3 x 3 convolution on the map (one
    pass); with stride > 1 the convolution alone, of H' W' tokens. Tokens before those of the map, a class token, pass
    unchanged at stride 1 (N > H W; timm takes none). ValueError where N < H W, or where there are such tokens at
    another stride.

    Compared with timm 1.0.31, models/twins.py.
    """

    def __init__(self, in_chans, embed_dim=768, stride=1, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim, 3, stride, 1, groups=embed_dim, device=device, dtype=dtype)
        )
        self.stride = stride

    def forward(self, x, size):
        before = x.shape[1] - size[0] * size[1]
        if before < 0 or (before and self.stride != 1):
            expected = f"[B, {size[0] * size[1]}, C] of a map {size[0]} x {size[1]}"
            raise ValueError(f"effvit::PosConv: x must be {expected}, got {list(x.shape)}")
        first, x = (x[:, :before], x[:, before:]) if before else (None, x)
        x = x.unflatten(1, tuple(size))
        conv = self.proj[0]
        if len(self.proj) > 1 or is_hooked(self.proj):
            y = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            y = x + y if self.stride == 1 else y
        else:
            y = _add_convolved(conv, x) if self.stride == 1 else depthwise(conv, x)
        y = y.flatten(1, 2)
        return y if first is None else torch.cat((first, y), dim=1)

    def no_weight_decay(self):
        return [f"proj.{i}.weight" for i in range(4)]


class ConvPosEnc(nn.Module):
    """The conditional position encoding of a map, x + act(conv(x)): a drop-in for timm's class (DaViT).

    x [B, dim, H, W] -> the same shape, channels last; k x k taps, odd (ValueError otherwise), act GELU or none.

    Sources: arXiv:2102.10882; compared with timm 1.0.31, models/davit.py.
    """

    def __init__(self, dim, k=3, act=False, device=None, dtype=None):
        super().__init__()
        padding = same_padding(self, "k", k)
        self.proj = nn.Conv2d(dim, dim, k, padding=padding, groups=dim, device=device, dtype=dtype)
        self.act = nn.GELU() if act else nn.Identity()

    def forward(self, x):
        if type(self.act) is nn.Identity and not is_hooked(self.act):
            return _add_convolved(self.proj, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.act(depthwise_map(self.proj, x))


class LePEAttention(nn.Module):
    """CSWin's attention in stripes with its locally enhanced position encoding (arXiv:2107.00652), between projections.

    Same constructor, same state_dict, same `forward(qkv)`: q, k and v, [3, B, L, dim] or three [B, L, dim], of a map of
    resolution x resolution -> [B, L, dim]. Windows are resolution x split_size (idx 0), split_size x resolution
    (idx 1) or the map (idx -1)::

        softmax(q k^T / sqrt(head dim)) v + get_v(v)

    with `get_v` a depthwise 3 x 3 convolution that sees zeros beyond its window. No window is copied; with `attn_drop`
    in training, in float64, with more than 256 channels a head and with hooks on `attn_drop`, attention runs in plain
    PyTorch. `dim_out` and `proj_drop` are accepted and unused, as in the original. ValueError where idx is another one,
    where split_size does not divide resolution, or num_heads not dim.

    Compared with microsoft/CSWin-Transformer, models/cswin.py at f111ae2.
    """

    def __init__(
        self, dim, resolution, idx, split_size=7, dim_out=None, num_heads=8, attn_drop=0.0, proj_drop=0.0,
        qk_scale=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if idx not in (-1, 0, 1):
            raise ValueError(f"effvit::LePEAttention: idx must be -1, 0 or 1, got {idx}")
        if idx >= 0 and resolution % split_size:
            expected = f"a divisor of the resolution {resolution}"
            raise ValueError(f"effvit::LePEAttention: split_size must be {expected}, got {split_size}")
        self.dim = dim
        self.resolution = resolution
        self.split_size = split_size
        self.num_heads = num_heads
        self.scale = qk_scale or head_dim(self, dim, num_heads) ** -0.5
        self.H_sp = split_size if idx == 1 else resolution
        self.W_sp = split_size if idx == 0 else resolution
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.attn_drop = nn.Dropout(attn_drop)

    def forward(self, qkv):
        size, window = (self.resolution, self.resolution), (self.H_sp, self.W_sp)
        q, k, v = (tokens_of(self, t, size).unflatten(1, size) for t in qkv)
        return (self._attend(q, k, v, window) + self._encode(v, window)).flatten(1, 2)

    def _attend(self, q, k, v, window):
        heads = (self.num_heads, -1)
        drop = self.attn_drop
        active = is_hooked(drop) or (drop.training and drop.p > 0)
        if not active and _ops._covered(q.dtype, q.shape[-1] // self.num_heads):
            q, k, v = (t.unflatten(-1, heads) for t in (q, k, v))
            return effvit.ops.window_attention(q, k, v, window=window, scale=self.scale)[0].flatten(-2)
        q, k, v = (window_partition(t, window).unflatten(-1, heads).transpose(1, 2) for t in (q, k, v))
        y = drop((q * self.scale @ k.mT).softmax(-1)) @ v if active else softmax_attention(q, k, v, scale=self.scale)
        return window_merge(y.transpose(1, 2).flatten(2), window, self.resolution, self.resolution)

    def _encode(self, v, window):
        conv = self.get_v
        if is_operators(conv) and conv.padding == (1, 1):
            return dwconv(v, conv.weight, conv.bias, padding=conv.padding, window=window)
        y = window_partition(v, window)
        y = as_tokens(conv(as_map(y, window)))
        return window_merge(y, window, self.resolution, self.resolution)

    def extra_repr(self):
        return f"dim={self.dim}, num_heads={self.num_heads}, window={(self.H_sp, self.W_sp)}"
