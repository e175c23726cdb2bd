"""InceptionNeXt's token mixer: groups of channels with a square, a wide, a tall or no depthwise convolution."""

import torch
from torch import nn

from ._depthwise import depthwise


class InceptionDWConv2d(nn.Module):
    """InceptionNeXt's token mixer (arXiv:2303.16900), a drop-in for timm's class: same arguments and state_dict.

    x [B, in_chs, H, W] -> the same shape, channels last. The last three groups of g = int(in_chs * branch_ratio)
    channels are convolved depthwise, with square_kernel_size^2, 1 x band_kernel_size and band_kernel_size x 1 taps;
    the others pass. ValueError where a size is even, or where three groups have more channels than there are or none.
    timm's models take it as it is: `MetaNeXt(token_mixers=InceptionDWConv2d)`.

    Compared with timm 1.0.31, models/inception_next.py. sail-sg/inceptionnext has the same keys.
    """

    def __init__(
        self, in_chs, square_kernel_size=3, band_kernel_size=11, branch_ratio=0.125, dilation=1, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        name, g = "effvit::InceptionDWConv2d", int(in_chs * branch_ratio)
        for argument, k in (("square_kernel_size", square_kernel_size), ("band_kernel_size", band_kernel_size)):
            if k % 2 == 0:
                raise ValueError(f"{name}: {argument} must be odd, got {k}")
        if not 0 < 3 * g <= in_chs:
            expected = f"between 1 / {in_chs} and 1 / 3 for in_chs {in_chs}"
            raise ValueError(f"{name}: branch_ratio must be {expected}, got {branch_ratio}")
        factory = {"groups": g, "device": device, "dtype": dtype}
        square, band = (dilation * (k - 1) // 2 for k in (square_kernel_size, band_kernel_size))
        self.dwconv_hw = nn.Conv2d(g, g, square_kernel_size, padding=square, dilation=dilation, **factory)
        self.dwconv_w = nn.Conv2d(g, g, (1, band_kernel_size), padding=(0, band), dilation=(1, dilation), **factory)
        self.dwconv_h = nn.Conv2d(g, g, (band_kernel_size, 1), padding=(band, 0), dilation=(dilation, 1), **factory)
        self.split_indexes = (in_chs - 3 * g, g, g, g)

    def forward(self, x):
        parts = x.permute(0, 2, 3, 1).split(self.split_indexes, dim=-1)
        convs = (self.dwconv_hw, self.dwconv_w, self.dwconv_h)
        y = [parts[0], *(depthwise(conv, t) for conv, t in zip(convs, parts[1:], strict=True))]
        return torch.cat(y, dim=-1).permute(0, 3, 1, 2)

    def extra_repr(self):
        return f"split_indexes={self.split_indexes}"
