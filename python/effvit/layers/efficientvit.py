"""EfficientViT's multi-scale ReLU linear attention: timm's constructor and state_dict, one fused operator per scale."""

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import linear_attention
from ._tokens import convolve, convolve_all, is_hooked, same_padding


def _pair(x):
    x = tuple(x) if isinstance(x, (tuple, list)) else (x,)
    return x * 2 if len(x) == 1 else x


class ChannelNorm2d(nn.Module):
    """A norm over the channels of a map [B, C, H, W]; parameters and eps of MIT's."""

    eps = 1e-5

    def __init__(self, channels, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x):
        return self.normalise(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerNorm2d(ChannelNorm2d):
    def normalise(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm2d(ChannelNorm2d):
    def normalise(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps) + self.bias


# What MIT's code names by strings. Its "ln", a norm over the width of a map, is no norm of a LiteMLA.
NORMS = {"bn2d": nn.BatchNorm2d, "ln2d": LayerNorm2d, "trms2d": RMSNorm2d}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": lambda inplace: nn.GELU(approximate="tanh"),
}


def _by_name(argument, table, x):
    """A class or None as it is, a name as the class that it stands for in MIT's code."""
    if not isinstance(x, str):
        return x
    if x not in table:
        raise ValueError(f"effvit::LiteMLA: {argument} must be None, a class or one of {list(table)}, got {x!r}")
    return table[x]


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
        if type(self.kernel_func) is not nn.ReLU or is_hooked(self.kernel_func):
            q, k, feature_map = self.kernel_func(q), self.kernel_func(k), "none"
        out = linear_attention(q, k, v, feature_map=feature_map, eps=self.eps)
        return out.reshape(B, H, W, C // 3)


class LiteMLA(LiteMLAForward, nn.Module):
    """Lightweight multi-scale linear attention of EfficientViT (arXiv:2205.14756), a drop-in for timm's and for MIT's.

    Per head relu(q) (relu(k)^T v) / (relu(q) . sum relu(k) + eps), over the projected map and over one depthwise and
    grouped aggregation of it per entry of `scales`. Sums are float32 in every dtype.

    Compared with timm 1.0.31, models/efficientvit_mit.py, and mit-han-lab/efficientvit at de7d773,
    efficientvit/models/nn/ops.py: all three have the same state_dict. Norms, activations and `kernel_func` are classes,
    as timm has them, or names, as MIT has them ("bn2d", "ln2d", "trms2d"; "relu", "relu6", "hswish", "silu", "gelu");
    `norm` and `act_func` are MIT's arguments for `norm_layer` and `act_layer`. The two differ in `eps`, which matters
    where the sum of a query is small: by default it is timm's 1e-5, but MIT's 1e-15 where a name, `norm` or `act_func`
    is given.
    """

    def __init__(
        self, in_channels, out_channels, heads=None, heads_ratio=1.0, dim=8, use_bias=False,
        norm_layer=(None, nn.BatchNorm2d), act_layer=(None, None), kernel_func=nn.ReLU, scales=(5,), eps=None,
        norm=..., act_func=..., device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        norms, activations = (
            _pair(norm_layer if norm is ... else norm),
            _pair(act_layer if act_func is ... else act_func),
        )
        if eps is None:
            named = any(isinstance(x, str) for x in (*norms, *activations, kernel_func))
            eps = 1e-15 if named or norm is not ... or act_func is not ... else 1e-5
        norms = [_by_name("norm", NORMS, x) for x in norms]
        activations = [_by_name("act_func", ACTIVATIONS, x) for x in activations]
        self.eps = eps
        self.dim = dim
        heads = heads or int(in_channels // dim * heads_ratio)
        if heads < 1:
            raise ValueError(f"effvit::LiteMLA: heads must be >= 1, got {heads}")
        width = 3 * heads * dim
        use_bias = _pair(use_bias)
        self.qkv = ConvNormAct(in_channels, width, use_bias[0], norms[0], activations[0], **factory)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(
                    width,
                    width,
                    scale,
                    padding=same_padding(self, "scales", scale),
                    groups=width,
                    bias=use_bias[0],
                    **factory,
                ),
                nn.Conv2d(width, width, 1, groups=3 * heads, bias=use_bias[0], **factory),
            )
            for scale in scales
        )
        self.kernel_func = _by_name("kernel_func", ACTIVATIONS, kernel_func)(inplace=False)
        self.proj = ConvNormAct(
            heads * dim * (1 + len(scales)), out_channels, use_bias[1], norms[1], activations[1], **factory
        )

    def extra_repr(self):
        return f"dim={self.dim}, eps={self.eps}"
