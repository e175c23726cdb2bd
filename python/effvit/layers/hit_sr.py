"""HiT-SR: spatial-channel correlation, two linear contractions per window and no map, and the blocks of its models."""

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import linear_attention
from ._tokens import as_map, as_tokens, convolve, convolve_all
from .swin_block import DropPath, Mlp
from .window_attention import WindowAttention, pair, relative_position_index, window_merge, window_partition


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

    Compared with XiangZ-0/HiT-SR, basicsr/archs/hit_sir_arch.py and hit_srf_arch.py at 8f59218, which have the same
    class. `dim` must be a multiple of 2 * num_heads, without which the original fails in its first call.
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
        qv = self.partition(self.qv(x.flatten(1, 2), size).unflatten(1, size))
        q, v = qv.unflatten(-1, (2, self.num_heads, -1)).unbind(2)  # [nW, L, heads, c], views
        x = torch.cat([self.spatial_self_correlation(q, v), self.channel_self_correlation(q, v)], dim=-1)
        x = window_merge(x, self.window_size, *size)[:, :H, :W]
        return self.proj_drop(self.proj(x))

    def partition(self, qv):
        """[B, H, W, dim] -> [nW, L, dim]."""
        return window_partition(qv, self.window_size)

    def spatial_self_correlation(self, q, v):
        """q, v [nW, L, heads, c] -> [nW, L, heads * c]."""
        (mh, mw), (rh, rw) = self.base_win_size, self.cell
        cells = v.unflatten(1, (mh, rh, mw, rw)).permute(0, 1, 3, 5, 6, 2, 4).flatten(-2)
        p = self.spatial_linear(cells).squeeze(-1).flatten(1, 2)  # [nW, m, heads, c]
        dropped = self.value_drop(p)
        out = linear_attention(q, p, dropped, feature_map="none", normalize="none", scale=1.0 / self.scale)
        return (out + torch.einsum("hlm,nmhc->nlhc", self.position_bias(q), dropped)).flatten(2)

    def channel_self_correlation(self, q, v):
        """q, v [nW, L, heads, c] -> [nW, L, heads * c]; the heads are one."""
        q, v = q.flatten(2), v.flatten(2)
        dropped = self.value_drop(v)
        tokens = (t.unsqueeze(2) for t in (dropped, v, q))
        return linear_attention(*tokens, feature_map="none", normalize="none", scale=1.0 / v.shape[1]).squeeze(2)

    def position_bias(self, like):
        """[heads, L, m], on the device and from coordinates in the dtype of `like`: a quantised Linear has neither."""
        (wh, ww), (mh, mw), (rh, rw) = self.window_size, self.base_win_size, self.cell
        offsets = [torch.arange(1 - w, w, device=like.device, dtype=like.dtype) for w in (wh, ww)]
        table = self.pos(torch.cartesian_prod(*offsets)).T.unflatten(1, (2 * wh - 1, 2 * ww - 1))
        # Query y and the rh keys of cell i are y - i*rh + wh - rh .. y - i*rh + wh - 1 rows into the table: one window
        # of the box filter, which starts at the first of them
        table = F.avg_pool2d(table, (rh, rw), stride=1)
        rows, columns = (
            torch.arange(w, device=like.device)[:, None] - torch.arange(m, device=like.device) * r + w - r
            for w, m, r in ((wh, mh, rh), (ww, mw, rw))
        )
        bias = table[:, rows[:, None, :, None], columns[None, :, None, :]]  # [heads, wh, ww, mh, mw]
        return bias.flatten(1, 2).flatten(2)

    def extra_repr(self):
        return f"dim={self.dim}, window_size={self.window_size}, num_heads={self.num_heads}"


class NGramWindowAttention(WindowAttention):
    """Swin's window attention with the argument order of HiT-SNG, and its buffer in the state_dict."""

    def __init__(
        self, dim, window_size, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__(
            dim, num_heads, None, window_size, qkv_bias, attn_drop, proj_drop, qk_scale, device, dtype
        )  # fmt: skip
        self.register_buffer("relative_position_index", relative_position_index(self.window_size, device))


class NGramContext(nn.Module):
    """What HiT-SNG adds to every token of a window: attention among the window and its `ngram`^2 - 1 neighbours.

    A window is summed up in a token of dim / 2 channels, by one filter over its pixels and over pairs of channels.
    Every token attends to those to its right and below, and, with the same weights, to those to its left and above;
    each group of `ngram` x `ngram` is averaged. Beyond the map are the last `ngram` - 1 rows and columns before its
    edge ("seq_refl_win_pad"), or zeros ("zero_pad").

    x [B, H, W, dim] -> [B, H / window, W / window, 1, 1, dim]. Compared with XiangZ-0/HiT-SR,
    basicsr/archs/hit_sng_arch.py at 8f59218: constructor, call and state_dict are the original's.
    """

    def __init__(
        self, dim, window_size, ngram, ngram_num_heads, padding_mode="seq_refl_win_pad", device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if padding_mode not in ("seq_refl_win_pad", "zero_pad"):
            raise ValueError(
                f"effvit::NGramContext: padding_mode must be 'seq_refl_win_pad' or 'zero_pad', got {padding_mode!r}"
            )
        self.dim = dim
        self.window_size = pair(window_size)
        self.ngram = ngram
        self.padding_mode = padding_mode
        self.unigram_embed = nn.Conv2d(2, 1, self.window_size, stride=self.window_size, **factory)
        self.ngram_attn = NGramWindowAttention(dim // 2, (ngram, ngram), ngram_num_heads, **factory)
        self.merge = nn.Conv2d(dim, dim, 1, **factory)

    def forward(self, x):
        unigrams = self.unigrams(x)
        windows = unigrams.shape[1:3]
        if self.padding_mode == "seq_refl_win_pad" and min(windows) < self.ngram:
            raise ValueError(
                f"effvit::NGramContext: x must have at least {self.ngram} windows of {list(self.window_size)} on each "
                f"axis, got {list(x.shape)}"
            )
        # Both directions in one call
        context = self.sliding_attention(torch.cat([self.pad(unigrams, back) for back in (False, True)]), windows)
        context = torch.cat(context.chunk(2), dim=-1).permute(0, 3, 1, 2)
        return convolve(self.merge, context).permute(0, 2, 3, 1)[:, :, :, None, None]

    def unigrams(self, x):
        """[B, H, W, dim] -> [B, H / window, W / window, dim / 2]: `unigram_embed` on maps of two channels."""
        (B, H, W, C), (wh, ww) = x.shape, self.window_size
        # A product for either channel of a pair, on all channels: the map stays as it is in memory
        both = self.unigram_embed.weight[0].flatten(1) @ window_partition(x, self.window_size)  # [nW, 2, C]
        tokens = both.unflatten(-1, (C // 2, 2)).diagonal(dim1=1, dim2=3).sum(-1) + self.unigram_embed.bias
        return tokens.view(B, H // wh, W // ww, C // 2)

    def pad(self, x, back):
        """[B, h, w, c] -> [B, h + ngram - 1, w + ngram - 1, c], at the far edges, or at the near ones."""
        n = self.ngram
        if self.padding_mode == "zero_pad":
            edges = (n - 1, 0) if back else (0, n - 1)
            return F.pad(x, (0, 0, *edges, *edges))
        for axis in (1, 2):
            size = x.shape[axis]
            more = x.narrow(axis, 1 if back else size - n, n - 1)
            x = torch.cat([more, x] if back else [x, more], dim=axis)
        return x

    def sliding_attention(self, x, windows):
        """[B, h + ngram - 1, w + ngram - 1, c] -> [B, h, w, c]."""
        n, (h, w) = self.ngram, windows
        groups = x.unfold(1, n, 1).unfold(2, n, 1).permute(0, 1, 4, 2, 5, 3)  # [B, h, n, w, n, c]
        attended = self.ngram_attn(groups.flatten(3, 4).flatten(1, 2))
        return attended.unflatten(2, (w, n)).unflatten(1, (h, n)).mean((2, 4))

    def extra_repr(self):
        return f"dim={self.dim}, window_size={self.window_size}, ngram={self.ngram}"


class NGramWindowPartition(nn.Module):
    """HiT-SNG's partition into windows: the `NGramContext` of a window added to its tokens, then a cyclic shift.

    x [B, H, W, dim] -> [nW, Wh, Ww, dim]. Compared with XiangZ-0/HiT-SR, basicsr/archs/hit_sng_arch.py at 8f59218,
    which takes square windows alone.
    """

    def __init__(self, dim, window_size, ngram, ngram_num_heads, shift_size=0, device=None, dtype=None):
        super().__init__()
        self.window_size = pair(window_size)
        self.ngram = ngram
        self.shift_size = shift_size
        self.ngram_context = NGramContext(dim, window_size, ngram, ngram_num_heads, device=device, dtype=dtype)

    def forward(self, x):
        context = self.ngram_context(x).flatten(0, 2).squeeze(1)  # [nW, 1, dim]
        windows = window_partition(x, self.window_size) + context
        if self.shift_size > 0:
            x = window_merge(windows, self.window_size, *x.shape[1:3])
            windows = window_partition(x.roll((-self.shift_size, -self.shift_size), (1, 2)), self.window_size)
        return windows.unflatten(1, self.window_size)


class NGramSCC(SCC):
    """The `SCC` of HiT-SNG: queries and values have the context of their window's neighbours (`NGramContext`, ngram 2).

    x must have at least two windows on each axis. Compared with XiangZ-0/HiT-SR, basicsr/archs/hit_sng_arch.py at
    8f59218, which takes square windows alone.
    """

    def __init__(
        self, dim, base_win_size, window_size, num_heads, value_drop=0.0, proj_drop=0.0, device=None, dtype=None
    ):
        super().__init__(dim, base_win_size, window_size, num_heads, value_drop, proj_drop, device, dtype)
        self.ngram_window_partition = NGramWindowPartition(
            dim, self.window_size, 2, num_heads, device=device, dtype=dtype
        )  # fmt: skip

    def partition(self, qv):
        return self.ngram_window_partition(qv).flatten(1, 2)


class DepthwiseGELU(nn.Module):
    """A depthwise 5x5 convolution and GELU, on tokens; the original's parameter names."""

    def __init__(self, channels, device=None, dtype=None):
        super().__init__()
        convolution = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, device=device, dtype=dtype)
        self.depthwise_conv = nn.Sequential(convolution, nn.GELU())

    def forward(self, x, x_size):
        return as_tokens(convolve_all(self.depthwise_conv, as_map(x, x_size)))


class ConvFFN(nn.Module):
    """HiT-SRF's feed-forward network: between its two linear layers x + GELU(depthwise 5x5 convolution of x).

    x [B, H*W, in_features], x_size (H, W) -> [B, H*W, out_features]. Compared with XiangZ-0/HiT-SR,
    basicsr/archs/hit_srf_arch.py at 8f59218: constructor, call and state_dict are the original's.
    """

    def __init__(
        self, in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, **factory)
        self.act = act_layer()
        self.dwconv = DepthwiseGELU(hidden_features, **factory)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x, x_size):
        x = self.act(self.fc1(x))
        x = self.drop(x + self.dwconv(x, x_size))
        return self.drop(self.fc2(x))


class HierarchicalTransformerBlock(nn.Module):
    """HiT-SIR's block on `SCC`: arguments, state_dict and `forward(x[B, H*W, dim], x_size, win_size)` of the original.

    `input_resolution` is accepted and does nothing; `win_size` must be the block's own. Compared with XiangZ-0/HiT-SR,
    basicsr/archs/hit_sir_arch.py at 8f59218, which fails where the padding is as large as the map; here, as in
    hit_srf_arch.py, the map is reflected as often as the padding needs.
    """

    correlation_layer = SCC
    mlp_layer = Mlp

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
        self.correlation = self.correlation_layer(
            dim, base_win_size, window_size, num_heads, value_drop, drop, **factory
        )  # fmt: skip
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = self.mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop, **factory)

    def forward(self, x, x_size, win_size=None):
        if win_size is not None and pair(win_size) != self.window_size:
            raise ValueError(
                f"effvit::{type(self).__name__}: win_size must be {list(self.window_size)} like window_size, got "
                f"{list(pair(win_size))}"
            )
        correlated = self.correlate(x.unflatten(1, x_size)).flatten(1, 2)
        x = x + self.drop_path(self.norm1(correlated))
        return x + self.drop_path(self.norm2(self.feed_forward(x, x_size)))

    def correlate(self, x):
        return self.correlation(x)

    def feed_forward(self, x, x_size):
        return self.mlp(x)


class ConvHierarchicalTransformerBlock(HierarchicalTransformerBlock):
    """HiT-SRF's block: HiT-SIR's with a `ConvFFN`. Compared with basicsr/archs/hit_srf_arch.py at 8f59218."""

    mlp_layer = ConvFFN

    def feed_forward(self, x, x_size):
        return self.mlp(x, x_size)


class NGramHierarchicalTransformerBlock(HierarchicalTransformerBlock):
    """HiT-SNG's block: HiT-SIR's with an `NGramSCC`, the map padded to an even number of windows on each axis.

    Compared with basicsr/archs/hit_sng_arch.py at 8f59218.
    """

    correlation_layer = NGramSCC

    def correlate(self, x):
        (H, W), (wh, ww) = x.shape[1:3], self.window_size
        return self.correlation(pad_reflect(x, -H % (2 * wh), -W % (2 * ww)))[:, :H, :W]
