"""HiT-SR's spatial-channel correlation and its block: two linear contractions per window, no correlation map."""

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import linear_attention
from ._tokens import as_map, as_tokens, convolve, convolve_all
from .swin_block import DropPath, Mlp
from .window_attention import pair, window_merge, window_partition


def pad_reflect(x, pad_h, pad_w):
    """x [B, H, W, C] -> [B, H + pad_h, W + pad_w, C], reflected at the far edges, as often as the padding needs."""
    x = x.permute(0, 3, 1, 2)
    for axis, pad in ((2, pad_h), (3, pad_w)):
        while pad:
            size = x.shape[axis]
            step = min(pad, max(size - 1, 1))
            x = F.pad(x, (0, step, 0, 0) if axis == 3 else (0, 0, 0, step), "reflect" if size > 1 else "replicate")
            pad -= step
    return x.permute(0, 2, 3, 1)


class DFE(nn.Module):
    """HiT-SR's dual feature extraction: a convolutional branch times a linear one."""

    def __init__(self, in_features, out_features, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden = in_features // 5
        self.out_features = out_features
        self.conv = nn.Sequential(
            nn.Conv2d(in_features, hidden, 1, **factory),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, hidden, 3, padding=1, **factory),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, out_features, 1, **factory),
        )
        self.linear = nn.Conv2d(in_features, out_features, 1, **factory)

    def forward(self, x, x_size):
        """x [B, H*W, in_features] -> [B, H*W, out_features]."""
        x = as_map(x, x_size)
        return as_tokens(convolve_all(self.conv, x) * convolve(self.linear, x))


class DynamicPosBias(nn.Module):
    """An MLP from relative coordinates [n, 2] to one bias per head [n, num_heads]; the original's parameter names."""

    def __init__(self, dim, num_heads, residual, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.residual = residual
        self.num_heads = num_heads
        self.pos_dim = dim // 4
        self.pos_proj = nn.Linear(2, self.pos_dim, **factory)
        for name, width in (("pos1", self.pos_dim), ("pos2", self.pos_dim), ("pos3", num_heads)):
            layers = nn.LayerNorm(self.pos_dim, **factory), nn.ReLU(), nn.Linear(self.pos_dim, width, **factory)
            setattr(self, name, nn.Sequential(*layers))

    def forward(self, biases):
        pos = self.pos_proj(biases)
        if self.residual:
            pos = pos + self.pos1(pos)
            pos = pos + self.pos2(pos)
        else:
            pos = self.pos2(self.pos1(pos))
        return self.pos3(pos)


class SCC(nn.Module):
    """Spatial-channel correlation of HiT-SR (arXiv:2407.05878), a drop-in for the original: arguments, state_dict.

    In windows of L tokens, with p the values v averaged down (by a learned filter) to the m tokens of the base
    window, c channels per head and B a relative position bias [L, m]::

        spatial: (q p^T / c + B) p        channel: ((q^T v / L) v^T)^T

    No softmax stands between the products: spatial is q (p^T p) / c + B p, channel is v (v^T q) / L, each a linear
    attention without normaliser. B is the mean over the cells of the base window of a bias [L, L]; it is taken from
    the table of relative positions, box-filtered once, so that no [L, L] exists (L is 4096 at the largest window).

    x [B, H, W, dim] -> [B, H, W, dim]. A map that the window does not divide is padded by reflection, before the
    convolutions, and cut: what the original's block does.
    """

    def __init__(
        self, dim, base_win_size, window_size, num_heads, value_drop=0.0, proj_drop=0.0, device=None, dtype=None
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.window_size = pair(window_size)
        self.base_win_size = tuple(min(w, b) for w, b in zip(self.window_size, pair(base_win_size), strict=True))
        self.cell = tuple(w // b for w, b in zip(self.window_size, self.base_win_size, strict=True))
        if any(w % b for w, b in zip(self.window_size, self.base_win_size, strict=True)):
            raise ValueError(
                f"effvit::SCC: window_size must be a multiple of base_win_size {list(pair(base_win_size))} or below it "
                f"on each axis, got {list(self.window_size)}"
            )
        if dim % (2 * num_heads):
            raise ValueError(f"effvit::SCC: dim must be a multiple of 2 * num_heads = {2 * num_heads}, got {dim}")
        self.num_heads = num_heads
        self.qv = DFE(dim, dim, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.value_drop = nn.Dropout(value_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        self.scale = dim // (2 * num_heads)
        self.spatial_linear = nn.Linear(self.cell[0] * self.cell[1], 1, **factory)
        self.pos = DynamicPosBias(dim // 4, num_heads, residual=False, **factory)

    def forward(self, x):
        H, W = x.shape[1:3]
        wh, ww = self.window_size
        pad = (-H % wh, -W % ww)
        if any(pad):
            x = pad_reflect(x, *pad)
        size = x.shape[1:3]
        qv = window_partition(self.qv(x.flatten(1, 2), size).unflatten(1, size), self.window_size)
        q, v = qv.unflatten(-1, (2, self.num_heads, -1)).unbind(2)  # [nW, L, heads, c], views
        x = torch.cat([self.spatial_self_correlation(q, v), self.channel_self_correlation(q, v)], dim=-1)
        x = window_merge(x, self.window_size, *size)[:, :H, :W]
        return self.proj_drop(self.proj(x))

    def spatial_self_correlation(self, q, v):
        """q, v [nW, L, heads, c] -> [nW, L, heads * c]."""
        (mh, mw), (rh, rw) = self.base_win_size, self.cell
        cells = v.unflatten(1, (mh, rh, mw, rw)).permute(0, 1, 3, 5, 6, 2, 4).flatten(-2)
        p = self.spatial_linear(cells).squeeze(-1).flatten(1, 2)  # [nW, m, heads, c]
        dropped = self.value_drop(p)
        out = linear_attention(q, p, dropped, feature_map="none", normalize="none", scale=1.0 / self.scale)
        return (out + torch.einsum("hlm,nmhc->nlhc", self.position_bias(), dropped)).flatten(2)

    def channel_self_correlation(self, q, v):
        """q, v [nW, L, heads, c] -> [nW, L, heads * c]; the heads are one."""
        q, v = q.flatten(2), v.flatten(2)
        dropped = self.value_drop(v)
        tokens = (t.unsqueeze(2) for t in (dropped, v, q))
        return linear_attention(*tokens, feature_map="none", normalize="none", scale=1.0 / v.shape[1]).squeeze(2)

    def position_bias(self):
        """[heads, L, m]."""
        weight = self.pos.pos_proj.weight
        (wh, ww), (mh, mw), (rh, rw) = self.window_size, self.base_win_size, self.cell
        offsets = [torch.arange(1 - w, w, device=weight.device, dtype=weight.dtype) for w in (wh, ww)]
        table = self.pos(torch.cartesian_prod(*offsets)).T.unflatten(1, (2 * wh - 1, 2 * ww - 1))
        # Query y and the rh keys of cell i are y - i*rh + wh - rh .. y - i*rh + wh - 1 rows into the table: one window
        # of the box filter, which starts at the first of them
        table = F.avg_pool2d(table, (rh, rw), stride=1)
        rows, columns = (
            torch.arange(w, device=weight.device)[:, None] - torch.arange(m, device=weight.device) * r + w - r
            for w, m, r in ((wh, mh, rh), (ww, mw, rw))
        )
        bias = table[:, rows[:, None, :, None], columns[None, :, None, :]]  # [heads, wh, ww, mh, mw]
        return bias.flatten(1, 2).flatten(2)

    def extra_repr(self):
        return f"dim={self.dim}, window_size={self.window_size}, num_heads={self.num_heads}"


class HierarchicalTransformerBlock(nn.Module):
    """HiT-SIR's block on `SCC`: arguments, state_dict and `forward(x[B, H*W, dim], x_size, win_size)` of the original.

    `input_resolution` is accepted and does nothing; `win_size` must be the block's own.
    """

    def __init__(
        self, dim, input_resolution, num_heads, base_win_size, window_size, mlp_ratio=4.0, drop=0.0, value_drop=0.0,
        drop_path=0.0, act_layer=nn.GELU, norm_layer=nn.LayerNorm, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.input_resolution = input_resolution
        self.num_heads = num_heads
        self.window_size = pair(window_size)
        self.mlp_ratio = mlp_ratio
        self.norm1 = norm_layer(dim, **factory)
        self.correlation = SCC(dim, base_win_size, window_size, num_heads, value_drop, drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, drop, **factory)

    def forward(self, x, x_size, win_size=None):
        if win_size is not None and pair(win_size) != self.window_size:
            raise ValueError(
                f"effvit::HierarchicalTransformerBlock: win_size must be {list(self.window_size)} like window_size, "
                f"got {list(pair(win_size))}"
            )
        correlated = self.correlation(x.unflatten(1, x_size)).flatten(1, 2)
        x = x + self.drop_path(self.norm1(correlated))
        return x + self.drop_path(self.norm2(self.mlp(x)))
