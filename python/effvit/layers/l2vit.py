"""L2ViT: linear global attention, the local concentration module, and the block that holds both."""

import torch
from torch import nn

from ._ops import linear_attention
from ._tokens import as_map, as_tokens, convolve, head_dim, split_tokens
from .swin_block import DropPath, Mlp


class LinearGlobalAttention(nn.Module):
    """L2ViT's linear attention, with the constructor and the state_dict of the original (there `LinearAttention`).

    tau_h relu(q) (relu(k)^T v) / max(relu(q) . sum relu(k), 100) per head h; x [B, N, C] -> [B, N, C]. `attn_drop` is
    accepted and unused, as in the original.

    Sources: L2ViT (arXiv:2501.16182); compared with ChuanyangZheng/L2ViT, classification/models/l2vit.py at fad0341.
    """

    def __init__(
        self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, device=None, dtype=None
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        d = head_dim(self, dim, num_heads)
        self.scale = qk_scale or d**-0.5
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), self.scale, **factory))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        q, k, v = split_tokens(self.qkv(x), 3, self.num_heads)
        out = linear_attention(q, k, v, normalize="clamp", clamp_min=100.0)
        out = out * self.temperature.squeeze(-1).to(out.dtype)
        return self.proj_drop(self.proj(out.flatten(2)))

    def extra_repr(self):
        return f"num_heads={self.num_heads}"


class LCM(nn.Module):
    """Local concentration module: two depthwise convolutions around an activation and a BatchNorm.

    x [B, H*W, C], size (H, W) -> [B, H*W, C]. `hidden_features` and `drop` are accepted and unused, as in the original.
    """

    def __init__(
        self, in_features, hidden_features=None, out_features=None, act_layer=nn.GELU, drop=0.0, kernel_size=7,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        out_features = out_features or in_features
        conv = {
            "kernel_size": kernel_size, "padding": kernel_size // 2, "groups": out_features, "device": device,
            "dtype": dtype,
        }  # fmt: skip
        self.conv1 = nn.Conv2d(in_features, out_features, **conv)
        self.act = act_layer()
        self.bn = nn.BatchNorm2d(in_features, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(in_features, out_features, **conv)

    def forward(self, x, size):
        return as_tokens(convolve(self.conv2, self.bn(self.act(convolve(self.conv1, as_map(x, size))))))


class CPE(nn.Module):
    """Conditional position encoding: x + conv(x), depthwise; x [B, H*W, C], size (H, W)."""

    def __init__(self, dim, k=3, act=False, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, device=device, dtype=dtype)
        self.activation = nn.GELU() if act else nn.Identity()

    def forward(self, x, size):
        return x + self.activation(as_tokens(convolve(self.proj, as_map(x, size))))


class LGABlock(nn.Module):
    """L2ViT's linear global attention block, with the original's constructor and state_dict (compared at fad0341).

    x [B, H*W, C], size (H, W) -> (the same shape, size). `enhanced` adds the local concentration module after the
    attention. `window_size` is accepted and unused, as in the original.
    """

    def __init__(
        self, dim, num_heads, window_size=7, mlp_ratio=4.0, qkv_bias=True, drop_path=0.0, act_layer=nn.GELU,
        norm_layer=nn.LayerNorm, ffn=True, cpe_act=False, enhanced=False, device=None, dtype=None, **kwargs,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.ffn = ffn
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.cpe = nn.ModuleList([CPE(dim, act=cpe_act, **factory)])
        self.norm1 = norm_layer(dim, **factory)
        self.attn = LinearGlobalAttention(dim, num_heads, qkv_bias, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        if ffn:
            self.norm2 = norm_layer(dim, **factory)
            self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, **factory)
        self.local_mp = None
        if enhanced:
            self.norm3 = norm_layer(dim, **factory)
            self.local_mp = LCM(dim, act_layer=act_layer, **factory)

    def forward(self, x, size):
        x = self.cpe[0](x, size)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if self.local_mp is not None:
            x = x + self.drop_path(self.local_mp(self.norm3(x), size))
        if self.ffn:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x, size
