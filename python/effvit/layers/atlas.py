"""Atlas: multi-scale attention, windows of every scale that talk to coarser ones and back."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import softmax_attention
from .swin_block import DropPath, Mlp
from .window_attention import window_merge, window_partition


class CrossWindowAttention(nn.Module):
    """Softmax attention with queries of one tensor and keys and values of another; the names of the original."""

    def __init__(self, dim, num_heads=8, qkv_bias=False, attn_drop=0.0, proj_drop=0.0, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)

    def queries(self, x):
        """[windows, N, C] -> [windows, N, h, d]."""
        return self.q(x).unflatten(-1, (self.num_heads, -1))

    def keys_and_values(self, x):
        """[windows, N, C] -> [windows, N, 2, h, d]."""
        return self.kv(x).unflatten(-1, (2, self.num_heads, -1))

    def forward(self, q, kv):
        """q [windows, N, h, d], kv [windows, M, 2, h, d] -> [windows, N, C]."""
        k, v = kv.transpose(1, 3).unbind(2)  # [windows, h, M, d]
        p = self.attn_drop if self.training else 0.0
        out = softmax_attention(q.transpose(1, 2), k, v, dropout_p=p)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class CrossWindowBlock(nn.Module):
    """What one scale has: two norms, attention, a norm and an MLP."""

    def __init__(
        self, dim, num_heads, mlp_ratio, qkv_bias, drop, attn_drop, drop_path, norm_layer, device=None, dtype=None
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm1_q = norm_layer(dim, **factory)
        self.norm1_kv = norm_layer(dim, **factory)
        self.attn = CrossWindowAttention(dim, num_heads, qkv_bias, attn_drop, drop, **factory)
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def queries(self, x):
        return self.attn.queries(self.norm1_q(x))

    def keys_and_values(self, x):
        return self.attn.keys_and_values(self.norm1_kv(x))

    def update(self, x, mixed):
        """x and what attention found, each [windows, N, C] -> x after both residuals."""
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class RelativePositionEmbed(nn.Module):
    """Adds an MLP of the two coordinates within a window, each between -1 and 1."""

    def __init__(self, embed_dim, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.projector = nn.Sequential(
            nn.Linear(2, 512, **factory), nn.ReLU(), nn.Linear(512, embed_dim, bias=False, **factory)
        )

    def forward(self, x):
        """[windows, size * size, C] -> the same."""
        size = math.isqrt(x.shape[1])
        axis = (torch.arange(size, device=x.device, dtype=x.dtype) - size // 2) / max(size // 2, 1)
        return x + self.projector(torch.cartesian_prod(axis, axis))


class MultiScaleAttentionBlock(nn.Module):
    """Atlas' multi-scale attention (MSA, arXiv:2503.12355): the state_dict of the original block.

    Takes and returns a list of scales, the finest first, each as windows [B * nW, N, dim] in the order of the map:
    `tokens` makes it of a map [B, H, W, dim] by max pooling, `multiscale_layout` gives grids and sizes. One block per
    scale, then:

    1. Every scale gets its position embedding, and what its finer neighbour has, pooled (max over `local2global` x
       `local2global` tokens), is added to it.
    2. From the coarsest to the finest, every window attends to itself and to windows of all coarser scales.
    3. From the second finest to the coarsest, the tokens of a scale attend to the window of the finer scale that they
       summarise; attention and MLP of a scale have the same weights as in 2.

    In 2, window w of nW attends to window w * nW' // nW of a coarser scale with nW' windows, in the order of the map,
    as in the published code: rows of windows, not squares, where a coarser scale has several.

    Maps are square, of `resolution` tokens a side; `merge_ratio` is the side of a window. Keys are those of one window
    and others beside it, so this is F.scaled_dot_product_attention on windows, not effvit.window_attention.

    Compared with YalaLab/atlas, sandstone/models/msa.py and attention.py at 9915894. Differences: the layout follows
    from `resolution`, dropout of probabilities is off in evaluation, a window of one token has position 0 (NaN there).
    """

    def __init__(
        self, dim, num_heads, resolution, mlp_ratio=4.0, qkv_bias=True, drop=0.0, attn_drop=0.0, drop_path=0.0,
        norm_layer=nn.LayerNorm, merge_ratio=16, local2global=4, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.merge_ratio = merge_ratio
        self.local2global = local2global
        self.multiscale_layout = []
        if merge_ratio < 1:
            raise ValueError(f"effvit::MultiScaleAttentionBlock: merge_ratio must be at least 1, got {merge_ratio}")
        if local2global < 2 or merge_ratio % local2global:
            raise ValueError(
                f"effvit::MultiScaleAttentionBlock: local2global must be a divisor of {merge_ratio} above 1, "
                f"got {local2global}"
            )
        sides = [resolution]
        while sides[-1] > merge_ratio:
            sides.append(sides[-1] // local2global)
        for name, ok, expected, got in (
            ("dim", num_heads >= 1 and dim % num_heads == 0, f"a multiple of num_heads {num_heads}", dim),
            ("resolution", all(s % merge_ratio == 0 for s in sides[:-1]) and sides[-1] > 0,
             f"such that windows of {merge_ratio} divide the scales", resolution),
        ):  # fmt: skip
            if not ok:
                raise ValueError(f"effvit::MultiScaleAttentionBlock: {name} must be {expected}, got {got}")
        for side in sides:
            grid = max(side // merge_ratio, 1)
            self.multiscale_layout.append({"grid_size": (grid, grid), "window": min(side, merge_ratio)})
        self.blocks = nn.ModuleList(
            CrossWindowBlock(
                dim, num_heads, mlp_ratio, qkv_bias, drop, attn_drop, drop_path, norm_layer, **factory
            )
            for _ in sides
        )  # fmt: skip
        self.posemb = nn.ModuleList(RelativePositionEmbed(dim, **factory) for _ in sides)

    def tokens(self, x):
        """A map [B, H, W, dim] -> its scales: x itself, and its maxima over 4 x 4, 16 x 16, .. (`local2global`)."""
        scales = []
        for i, layout in enumerate(self.multiscale_layout):
            if i:
                x = self._pool(x)
            scales.append(window_partition(x, (layout["window"],) * 2))
        return scales

    def _pool(self, x):
        return F.max_pool2d(x.permute(0, 3, 1, 2), self.local2global).permute(0, 2, 3, 1)

    def _map(self, x, i):
        """Windows of scale i -> [B, H, W, C]."""
        layout = self.multiscale_layout[i]
        side = layout["grid_size"][0] * layout["window"]
        return window_merge(x, (layout["window"],) * 2, side, side)

    def _windows(self, x, i):
        return window_partition(x, (self.multiscale_layout[i]["window"],) * 2)

    def forward(self, scales):
        scales = [embed(x) for embed, x in zip(self.posemb, scales, strict=True)]
        for i in range(len(scales) - 1):
            scales[i + 1] = scales[i + 1] + self._windows(self._pool(self._map(scales[i], i)), i + 1)

        windows = lambda i: self.multiscale_layout[i]["grid_size"][0] ** 2
        coarser = []  # keys and values of the scales done, the coarsest first
        for i in reversed(range(len(scales))):
            block, x = self.blocks[i], scales[i]
            kv = [block.keys_and_values(x)]
            kv += [t.repeat_interleave(windows(i) // windows(j), dim=0) for j, t in coarser]
            scales[i] = block.update(x, block.attn(block.queries(x), torch.cat(kv, dim=1)))
            if i:
                coarser.append((i, block.keys_and_values(scales[i])))

        for i in range(1, len(scales)):
            block, x = self.blocks[i], scales[i]
            grid = self.multiscale_layout[i - 1]["grid_size"][0]
            q = self._map(block.queries(x).flatten(2), i)
            side = q.shape[1] // grid  # of the part that a window of the finer scale became
            q = window_partition(q, (side, side)).unflatten(-1, (self.num_heads, -1))
            mixed = block.attn(q, self.blocks[i - 1].keys_and_values(scales[i - 1]))
            mixed = window_merge(mixed, (side, side), grid * side, grid * side)
            scales[i] = block.update(x, self._windows(mixed, i))
        return scales
