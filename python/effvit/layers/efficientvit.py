"""EfficientViT's multi-scale ReLU linear attention: timm's constructor and state_dict, one fused operator per scale."""

import torch
from torch import nn

from ._ops import linear_attention
from ._tokens import convolve, convolve_all


def _pair(x):
    x = tuple(x) if isinstance(x, (tuple, list)) else (x,)
    return x * 2 if len(x) == 1 else x


class ConvNormAct(nn.Module):
    """1x1 convolution, norm, activation; timm's parameter names."""

    def __init__(
        self, in_channels, out_channels, bias=False, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias, **factory)
        self.norm = norm_layer(out_channels, **factory) if norm_layer else nn.Identity()
        self.act = act_layer(inplace=True) if act_layer is not None else nn.Identity()

    def forward(self, x):
        return self.act(self.norm(convolve(self.conv, x)))


class LiteMLAForward:
    """The forward of a module that has timm's LiteMLA attributes: shared by `LiteMLA` and `effvit.patch`."""

    def forward(self, x):
        """x [B, C, H, W] -> [B, out_channels, H, W], in the memory format of x.

        All is computed channels last, where a map is a sequence of tokens already: an input that is not is converted
        before the projection triples its channels, and the output is converted back. Inside functorch transforms maps
        stay as they are.
        """
        # torch.vmap answers no question about memory formats
        transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        contiguous = not transformed and x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
        qkv = self.qkv(x if transformed else x.contiguous(memory_format=torch.channels_last))
        maps = [qkv, *(convolve_all(convolutions, qkv) for convolutions in self.aggreg)]
        # Scales share no head: attended one by one, their outputs are concatenated instead of their q, k and v.
        out = self.proj(torch.cat([self._attend(m) for m in maps], dim=-1).permute(0, 3, 1, 2))
        return out.contiguous() if contiguous else out

    def _attend(self, qkv):
        """qkv [B, h*3*d, H, W] -> [B, H, W, h*d]."""
        tokens = qkv.permute(0, 2, 3, 1).contiguous()  # no copy where the convolution kept channels last
        B, H, W, C = tokens.shape
        q, k, v = tokens.view(B, H * W, C // (3 * self.dim), 3, self.dim).unbind(3)
        feature_map = "relu"
        if type(self.kernel_func) is not nn.ReLU:
            q, k, feature_map = self.kernel_func(q), self.kernel_func(k), "none"
        out = linear_attention(q, k, v, feature_map=feature_map, eps=self.eps)
        return out.reshape(B, H, W, C // 3)


class LiteMLA(LiteMLAForward, nn.Module):
    """Lightweight multi-scale linear attention, a drop-in for `timm.models.efficientvit_mit.LiteMLA`.

    Per head relu(q) (relu(k)^T v) / (relu(q) . sum relu(k) + eps), over the projected map and over one depthwise and
    grouped aggregation of it per entry of `scales`. `eps` is timm's; the paper's code has 1e-15.

    Sources: EfficientViT (arXiv:2205.14756).
    """

    def __init__(
        self, in_channels, out_channels, heads=None, heads_ratio=1.0, dim=8, use_bias=False,
        norm_layer=(None, nn.BatchNorm2d), act_layer=(None, None), kernel_func=nn.ReLU, scales=(5,), eps=1e-5,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.eps = eps
        self.dim = dim
        heads = heads or int(in_channels // dim * heads_ratio)
        if heads < 1:
            raise ValueError(f"effvit::LiteMLA: heads must be >= 1, got {heads}")
        width = 3 * heads * dim
        use_bias, norm_layer, act_layer = _pair(use_bias), _pair(norm_layer), _pair(act_layer)
        self.qkv = ConvNormAct(in_channels, width, use_bias[0], norm_layer[0], act_layer[0], **factory)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, scale, padding=scale // 2, groups=width, bias=use_bias[0], **factory),
                nn.Conv2d(width, width, 1, groups=3 * heads, bias=use_bias[0], **factory),
            )
            for scale in scales
        )
        self.kernel_func = kernel_func(inplace=False)
        self.proj = ConvNormAct(
            heads * dim * (1 + len(scales)), out_channels, use_bias[1], norm_layer[1], act_layer[1], **factory
        )

    def extra_repr(self):
        return f"dim={self.dim}, eps={self.eps}"
