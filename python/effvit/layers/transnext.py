"""TransNeXt: the convolutional GLU in one pass, and aggregated attention without a copy of every window."""

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import dwconv_glu, local_pool_attention
from ._tokens import as_map, as_tokens, convolve, head_dim, is_hooked

_ACTIVATIONS = {
    nn.GELU: "gelu", nn.SiLU: "silu", nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.Identity: "none",
}  # fmt: skip


def _name_of(act):
    """What the operator calls this activation; None where it does not know it or calling it does more."""
    if is_hooked(act) or getattr(act, "approximate", "none") != "none":
        return None
    return _ACTIVATIONS.get(type(act))


class DWConv(nn.Module):
    """A depthwise 3 x 3 convolution of tokens; TransNeXt's parameter names."""

    def __init__(self, dim=768, device=None, dtype=None):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x, H, W):
        return as_tokens(convolve(self.dwconv, as_map(x, (H, W))))

    def is_plain(self):
        """Whether nothing but the convolution of this class runs."""
        conv = self.dwconv
        plain = type(self) is DWConv and type(conv) is nn.Conv2d and conv.padding_mode == "zeros"
        return plain and conv.padding == (1, 1) and conv.stride == (1, 1) and not (is_hooked(self) or is_hooked(conv))


class ConvGLU(nn.Module):
    """TransNeXt's convolutional GLU (arXiv:2311.17132), a drop-in for `ConvolutionalGLU` of its code.

    Same arguments, same state_dict, same `forward(x[B, H*W, C], H, W)`::

        x, v = split(fc1(x));    out = fc2(act(dwconv(x)) * v)

    with 2/3 of `hidden_features`, rounded down, on each side. The activation may be any module; GELU (the exact one),
    SiLU, ReLU, Sigmoid, Tanh and Identity run in the pass of the convolution.

    Compared with DaiShiResearch/TransNeXt, classification/transnext_native.py at ff68810.
    """

    def __init__(
        self, in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        out_features = out_features or in_features
        hidden_features = int(2 * (hidden_features or in_features) / 3)
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, **factory)
        self.dwconv = DWConv(hidden_features, **factory)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x, H, W):
        """x [B, H*W, in_features] -> [B, H*W, out_features]."""
        x, act = self.fc1(x), _name_of(self.act)
        if act is not None and self.dwconv.is_plain():
            conv = self.dwconv.dwconv
            x = dwconv_glu(x.unflatten(1, (H, W)), None, conv.weight, conv.bias, act=act).flatten(1, 2)
        else:
            x, v = x.chunk(2, dim=-1)
            x = self.act(self.dwconv(x, H, W)) * v
        return self.drop(self.fc2(self.drop(x)))


@torch.no_grad()
def get_relative_position_cpb(query_size, key_size, pretrain_size=None, device=None):
    """What `AggregatedAttention` needs to know of positions: (index [N * P], table [rows, 2]), as TransNeXt has them.

    Of N = product(query_size) positions and P = product(key_size) pooled ones, each the mean of those it pools. A row
    of the table is an offset, in eighths of the map of `pretrain_size` (by default query_size), on a logarithmic scale;
    the index says which row a pair has.
    """
    offsets = []
    for query, key, trained in zip(query_size, key_size, pretrain_size or query_size, strict=True):
        at = torch.arange(query, dtype=torch.float32, device=device)
        offsets.append((at[:, None] - F.adaptive_avg_pool1d(at[None], key)) * (8 / max(trained - 1, 1)))
    y, x = offsets[0][:, None, :, None], offsets[1][None, :, None, :]
    pairs = torch.stack(torch.broadcast_tensors(y, x), dim=-1).flatten(0, 3)
    table, index = torch.unique(pairs, return_inverse=True, dim=0)
    return index, table.sign() * torch.log2(table.abs() + 1) / 3


class AggregatedAttention(nn.Module):
    """TransNeXt's pixel-focused attention with aggregated tokens (arXiv:2311.17132), a drop-in for its class.

    Same arguments, same state_dict, same `forward(x[B, H*W, dim], H, W, relative_pos_index, relative_coords_table)`;
    for the last two see `get_relative_position_cpb`. Queries and keys have length 1; with s = (q + query_embedding) *
    softplus(temperature) * log(number of keys), one softmax over the scores of the window and of the pooled tokens, and
    q learnable_tokens + learnable_bias added to the weights of the window::

        out = proj(sum_window (a + q tokens + bias) v + sum_pooled b v)

    No copy of the windows is made. With `attn_drop`, in training, attention runs in plain PyTorch. The map must be of
    `input_resolution`, as in the original.

    Compared with DaiShiResearch/TransNeXt, classification/transnext_native.py at ff68810. Difference: there is no
    buffer `padding_mask`, which is not in its state_dict either.
    """

    def __init__(
        self, dim, input_resolution, num_heads=8, window_size=3, qkv_bias=True, attn_drop=0.0, proj_drop=0.0,
        sr_ratio=1, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        if window_size not in (3, 5, 7):
            raise ValueError(f"effvit::AggregatedAttention: window_size must be 3, 5 or 7, got {window_size}")
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = head_dim(self, dim, num_heads)
        self.input_resolution = tuple(input_resolution)
        self.sr_ratio = sr_ratio
        self.window_size = window_size
        self.local_len = window_size**2
        self.pool_H, self.pool_W = (n // sr_ratio for n in self.input_resolution)
        self.pool_len = self.pool_H * self.pool_W

        start = torch.full((num_heads, 1, 1), 1 / 0.24, device=device)  # of softplus(temperature)
        self.temperature = nn.Parameter(torch.log(torch.expm1(start)).to(dtype))
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.query_embedding = nn.Parameter(self._normal(0.02, num_heads, 1, self.head_dim, **factory))
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

        self.pool = nn.AdaptiveAvgPool2d((self.pool_H, self.pool_W))
        self.sr = nn.Conv2d(dim, dim, 1, **factory)
        self.norm = nn.LayerNorm(dim, **factory)
        self.act = nn.GELU()

        self.cpb_fc1 = nn.Linear(2, 512, **factory)
        self.cpb_act = nn.ReLU()
        self.cpb_fc2 = nn.Linear(512, num_heads, **factory)
        self.relative_pos_bias_local = nn.Parameter(self._normal(0.0004, num_heads, self.local_len, **factory))
        self.learnable_tokens = nn.Parameter(self._normal(0.02, num_heads, self.head_dim, self.local_len, **factory))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, self.local_len, **factory))

        keys = self._keys_around(*self.input_resolution).flatten().unsqueeze(-1) + self.pool_len
        self.register_buffer("seq_length_scale", keys.log().to(device, dtype), persistent=False)

    @staticmethod
    def _normal(std, *shape, device, dtype):
        return nn.init.trunc_normal_(torch.empty(*shape, device=device, dtype=dtype), std=std)

    def _keys_around(self, H, W):
        """How many positions of the map are in the window around each, [H, W]."""
        r = self.window_size // 2
        counts = []
        for n in (H, W):
            at = torch.arange(n, dtype=torch.float32)
            counts.append((at + r).clamp(max=n - 1) - (at - r).clamp(min=0) + 1)
        return counts[0][:, None] * counts[1]

    def forward(self, x, H, W, relative_pos_index, relative_coords_table):
        """x [B, H*W, dim] -> [B, H*W, dim]."""
        if (H, W) != self.input_resolution or x.shape[1] != H * W:
            name, (h, w) = "effvit::AggregatedAttention", self.input_resolution
            raise ValueError(f"{name}: x must be [B, {h * w}, C] of a map {h} x {w}, got {list(x.shape)}, {H} x {W}")
        heads = (self.num_heads, self.head_dim)
        q = F.normalize(self.q(x).unflatten(-1, heads), dim=-1).unflatten(1, (H, W))
        k, v = self.kv(x).unflatten(-1, (2, *heads)).unflatten(1, (H, W)).unbind(3)
        pooled = as_tokens(self.pool(self.act(convolve(self.sr, as_map(x, (H, W))))))
        k_pool, v_pool = self.kv(self.norm(pooled)).unflatten(-1, (2, *heads)).unbind(2)
        bias = self.cpb_fc2(self.cpb_act(self.cpb_fc1(relative_coords_table.to(self.cpb_fc1.weight.dtype))))
        pool_bias = bias.transpose(0, 1)[:, relative_pos_index.flatten()].unflatten(1, (H * W, self.pool_len))
        scale = F.softplus(self.temperature).flatten(1) * self.seq_length_scale.flatten()
        drop = self.attn_drop if self.training and self.attn_drop.p > 0 else None
        out = local_pool_attention(
            q, F.normalize(k, dim=-1), v, F.normalize(k_pool, dim=-1), v_pool, local_bias=self.relative_pos_bias_local,
            pool_bias=pool_bias, q_scale=scale, q_embed=self.query_embedding.squeeze(1), tokens=self.learnable_tokens,
            token_bias=self.learnable_bias.squeeze(1), window=self.window_size, drop=drop,
        )  # fmt: skip
        return self.proj_drop(self.proj(out.flatten(3).flatten(1, 2)))

    def extra_repr(self):
        return f"num_heads={self.num_heads}, window_size={self.window_size}, sr_ratio={self.sr_ratio}"
