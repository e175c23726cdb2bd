"""MLLA: Mamba-like linear attention with rotary and local position encodings (RoPE, LePE), and its block."""

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import linear_attention
from ._tokens import as_map, as_tokens, convolve, head_dim, tokens_of
from .swin_block import DropPath, Mlp
from .window_attention import pair


class RoPE(nn.Module):
    """Rotary encoding of maps [..., *shape]: shape (H, W, C), C a multiple of 4, angles of both axes side by side.

    Channels 2i and 2i+1 of a token are a complex number, turned by the angle in `rotations` [H, W, C/2, 2] (cosine,
    sine; float32, in the state_dict as in the original).
    """

    def __init__(self, shape, base=10000, device=None):
        super().__init__()
        *sizes, channels = shape
        self.base = base
        count = channels // (2 * len(sizes))
        if count < 1 or channels % count or 2 * len(sizes) * count != channels:
            raise ValueError(
                f"effvit::RoPE: shape must end in a multiple of {2 * len(sizes)} channels, got {tuple(shape)}"
            )
        self.register_buffer("rotations", self._rotations(sizes, count, device))

    def _rotations(self, sizes, count, device):
        """[*sizes, len(sizes) * count, 2]; cosines and sines are computed once per axis."""
        theta = self.base ** -(torch.arange(count, device=device) / count)
        axes = []
        for i, n in enumerate(sizes):
            angles = torch.arange(n, device=device).unsqueeze(-1) * theta
            turns = torch.stack([angles.cos(), angles.sin()], dim=-1)
            along = [n if j == i else 1 for j in range(len(sizes))]
            axes.append(turns.view(*along, count, 2).expand(*sizes, count, 2))
        return torch.cat(axes, dim=-2)

    def rotations_of(self, sizes):
        """`rotations` for maps of these sizes: the buffer where it is of them, else computed, in float32."""
        own = self.rotations
        if tuple(sizes) == tuple(own.shape[:-2]):
            return own
        return self._rotations(sizes, own.shape[-2] // len(sizes), own.device)

    def forward(self, x, rotations=None):
        """x [B, ..., C] -> the same, in float32 (float64 for float64); rotations: those of another size, or None."""
        x = x if x.dtype == torch.float64 else x.float()
        pairs, rotations = x.unflatten(-1, (-1, 2)), (self.rotations if rotations is None else rotations).to(x.dtype)
        if not torch.compiler.is_compiling():
            turned = torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(rotations)
            return torch.view_as_real(turned).flatten(-2)
        # The same product without complex numbers, which compilers do not fuse.
        (re, im), (cos, sin) = pairs.unbind(-1), rotations.unbind(-1)
        return torch.stack([re * cos - im * sin, re * sin + im * cos], dim=-1).flatten(-2)


def _tokens_and_size(module, x, hw_shape):
    """x [B, H*W, C] or [B, H, W, C] -> tokens and (H, W): hw_shape, else the map's own, else input_resolution."""
    if hw_shape is None:
        hw_shape = x.shape[1:3] if x.dim() == 4 else module.input_resolution
    size = tuple(hw_shape)
    return tokens_of(module, x, size), size


class MLLAttention(nn.Module):
    """MLLA's linear attention, with the constructor and the state_dict of the original (there `LinearAttention`).

    With phi = elu + 1 and n tokens: rope(phi(q)) (rope(phi(k))^T x / n) over phi(q) . mean phi(k) + 1e-6, plus a
    depthwise 3x3 convolution of x (LePE). The values are the input itself. x: [B, H, W, C], or [B, H*W, C] with
    H, W = hw_shape, by default input_resolution. Any size will do: the state_dict has the rotations of
    input_resolution, those of other sizes are computed when they are needed. Further keyword arguments of the
    constructor do nothing, as in the original.

    Sources: Demystify Mamba in Vision (arXiv:2405.16605); compared with LeapLabTHU/MLLA, commit 66b6d29: models/mlla.py
    (which takes x as a square map of input_resolution only) and
    downstream/detection/mmdet/models/backbones/mlla.py (which requires hw_shape and never uses the state_dict's
    rotations).
    """

    def __init__(self, dim, input_resolution, num_heads, qkv_bias=True, device=None, dtype=None, **kwargs):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.input_resolution = pair(input_resolution)
        head_dim(self, dim, num_heads)
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.rope = RoPE((*self.input_resolution, dim), device=device)

    def forward(self, x, hw_shape=None):
        v, size = _tokens_and_size(self, x, hw_shape)
        rotations = self.rope.rotations_of(size)
        features, roped = [], []
        for t in self.qk(v).chunk(2, dim=-1):
            phi = F.elu(t if t.dtype == torch.float64 else t.float()) + 1
            turned = self.rope(phi.unflatten(1, size), rotations).flatten(1, 2)
            features.append(phi.to(t.dtype).unflatten(-1, (self.num_heads, -1)))
            roped.append(turned.to(t.dtype).unflatten(-1, (self.num_heads, -1)))
        values = v.to(roped[0].dtype).unflatten(-1, (self.num_heads, -1))
        q, k = features
        out = linear_attention(
            *roped, values, q_den=q, k_den=k, feature_map="none", normalize="mean", eps=1e-6
        )  # fmt: skip
        return (out.flatten(2) + as_tokens(convolve(self.lepe, as_map(v, size)))).view(x.shape)

    def extra_repr(self):
        return f"dim={self.dim}, input_resolution={self.input_resolution}, num_heads={self.num_heads}"


class MLLABlock(nn.Module):
    """MLLA's block, with the original's constructor and state_dict: x [B, H*W, C] or [B, H, W, C] -> [B, H*W, C].

    H, W = hw_shape or else input_resolution: see `MLLAttention`, also for the versions compared with.
    """

    def __init__(
        self, dim, input_resolution, num_heads, mlp_ratio=4.0, qkv_bias=True, drop=0.0, drop_path=0.0,
        act_layer=nn.GELU, norm_layer=nn.LayerNorm, device=None, dtype=None, **kwargs,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.input_resolution = pair(input_resolution)
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.norm1 = norm_layer(dim, **factory)
        self.in_proj = nn.Linear(dim, dim, **factory)
        self.act_proj = nn.Linear(dim, dim, **factory)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.act = nn.SiLU()
        self.attn = MLLAttention(dim, self.input_resolution, num_heads, qkv_bias, **factory)
        self.out_proj = nn.Linear(dim, dim, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, drop, **factory)

    def forward(self, x, hw_shape=None):
        x, size = _tokens_and_size(self, x, hw_shape)
        conv = lambda conv, x: as_tokens(convolve(conv, as_map(x, size)))
        x = x + conv(self.cpe1, x)
        y = self.norm1(x)
        gate = self.act(self.act_proj(y))
        y = self.attn(self.act(conv(self.dwc, self.in_proj(y))), size)
        x = x + self.drop_path(self.out_proj(y * gate))
        x = x + conv(self.cpe2, x)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def extra_repr(self):
        return f"dim={self.dim}, input_resolution={self.input_resolution}, num_heads={self.num_heads}"
