"""CAS-ViT: convolutional additive self-attention, and its block, on maps [B, C, H, W]."""

from torch import nn

from ._tokens import convolve, convolve_all
from .swin_block import DropPath


class SpatialOperation(nn.Module):
    """x times a map of one channel: depthwise 3x3, BatchNorm, ReLU, 1x1, sigmoid."""

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory),
            nn.BatchNorm2d(dim, **factory),
            nn.ReLU(),
            nn.Conv2d(dim, 1, 1, bias=False, **factory),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return x * convolve_all(self.block, x)


class ChannelOperation(nn.Module):
    """x times a number for every channel: the mean over the map, 1x1, sigmoid."""

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        self.block = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(dim, dim, 1, bias=False, device=device, dtype=dtype),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return x * convolve_all(self.block, x)


class AdditiveTokenMixer(nn.Module):
    """CAS-ViT's additive attention (arXiv:2408.03703): the arguments and the state_dict of the original.

    x [B, dim, H, W] -> the same shape. With Phi the spatial and then the channel operation::

        proj(dwc(Phi_q(q) + Phi_k(k)) * v)

    q, k and v of one 1x1 convolution, dwc and proj depthwise 3x3. No pair of tokens is compared: linear in H * W.

    Compared with Tianfang-Zhang/CAS-ViT, classification/model/rcvit.py at 041d2d6.
    """

    def __init__(self, dim=512, attn_bias=False, proj_drop=0.0, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=attn_bias, **factory)
        self.oper_q = nn.Sequential(SpatialOperation(dim, **factory), ChannelOperation(dim, **factory))
        self.oper_k = nn.Sequential(SpatialOperation(dim, **factory), ChannelOperation(dim, **factory))
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        q, k, v = convolve(self.qkv, x).chunk(3, dim=1)
        context = convolve(self.dwc, self.oper_q(q) + self.oper_k(k))
        return self.proj_drop(convolve(self.proj, context * v))


class LocalIntegration(nn.Module):
    """1x1, norm, depthwise 3x3, activation, 1x1."""

    def __init__(self, dim, ratio=1, act_layer=nn.ReLU, norm_layer=nn.BatchNorm2d, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        hidden = round(ratio * dim)
        self.network = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, **factory),
            norm_layer(hidden, **factory),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **factory),
            act_layer(),
            nn.Conv2d(hidden, dim, 1, **factory),
        )

    def forward(self, x):
        return convolve_all(self.network, x)


class ConvMlp(nn.Module):
    """Two 1x1 convolutions with an activation."""

    def __init__(self, dim, hidden, act_layer=nn.GELU, drop=0.0, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.fc1 = nn.Conv2d(dim, hidden, 1, **factory)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(hidden, dim, 1, **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        x = self.drop(self.act(convolve(self.fc1, x)))
        return self.drop(convolve(self.fc2, x))


class AdditiveBlock(nn.Module):
    """CAS-ViT's block: local integration, additive attention and an MLP, each with a residual; x [B, dim, H, W].

    Arguments and state_dict of the original; see `AdditiveTokenMixer`. Its models pass act_layer=GELU and
    norm_layer=BatchNorm2d; the latter is the default here, where the original has GELU, with which it fails.
    """

    def __init__(
        self, dim, mlp_ratio=4.0, attn_bias=False, drop=0.0, drop_path=0.0, act_layer=nn.ReLU,
        norm_layer=nn.BatchNorm2d, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.local_perception = LocalIntegration(dim, 1, act_layer, norm_layer, **factory)
        self.norm1 = norm_layer(dim, **factory)
        self.attn = AdditiveTokenMixer(dim, attn_bias, drop, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), act_layer, drop, **factory)

    def forward(self, x):
        x = x + self.local_perception(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
