"""CoDeNet: deformable depthwise convolution whose taps form a square of variable size."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import wide
from ._tokens import convolve


class DeformConvSquareDepthWise(nn.Module):
    """CoDeNet's deformable convolution (arXiv:2006.08357), a drop-in for its class: depthwise, bounded and square.

    x [B, in_channels, H, W] -> [B, out_channels, H, W], channels last. One offset s a position, of 0 to `offset_bound`
    pixels, spreads the 3 x 3 taps::

        x = point_wise(x);    s = clamp(conv_offset(x), 0, offset_bound)
        out[c, y, x] = sum_ij weight[c, i, j] x[c, y + (i - 1) (dilation + s), x + (j - 1) (dilation + s)]

    with linear interpolation between pixels and zeros outside of the map. All taps share the fraction of s: a tap reads
    four pixels, those beside the middle two and the middle one. Sums are in float32. Differentiable in everything. It
    runs in PyTorch on every device. ValueError where stride is not 1 or padding not dilation (offsets are those of x),
    where kernel_size is not 3, deformable_groups not 1, bias not False (as there) or offset_bound negative.

    After DequanWang/CoDeNet, detectron2/layers/deform_conv_hw.py at d4a20bd, whose kernel is CUDA alone; the tests
    compare with its formula. The weight is initialised as a
    convolution's (the original leaves it undefined).
    """

    def __init__(
        self, in_channels, out_channels, offset_bound=8, kernel_size=3, stride=1, padding=1, dilation=1,
        deformable_groups=1, bias=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        name = "effvit::DeformConvSquareDepthWise"
        expected = {"kernel_size": 3, "stride": 1, "padding": dilation, "deformable_groups": 1, "bias": False}
        given = (kernel_size, stride, padding, deformable_groups, bias)
        for (argument, value), got in zip(expected.items(), given, strict=True):
            if got != value:
                raise ValueError(f"{name}: {argument} must be {value}, got {got}")
        if not 0 <= offset_bound < math.inf:
            raise ValueError(f"{name}: offset_bound must be a finite number from 0 on, got {offset_bound}")
        factory = {"device": device, "dtype": dtype}
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.offset_bound = offset_bound
        self.dilation = dilation
        self.weight = nn.Parameter(torch.empty(out_channels, 1, 3, 3, **factory))
        self.conv_offset = nn.Conv2d(out_channels, 1, 1, **factory)
        self.point_wise = nn.Conv2d(in_channels, out_channels, 1, bias=False, **factory)
        template = [float(t) for i in (-1, 0, 1) for j in (-1, 0, 1) for t in (i, j)]
        self.register_buffer("offset_template", torch.tensor(template, **factory).view(1, 18, 1, 1))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x):
        x = convolve(self.point_wise, x)
        spread = convolve(self.conv_offset, x).clamp(0, self.offset_bound)[:, 0]  # [B, H, W]
        taps = wide(self.weight.to(x.dtype)).flatten(1)
        out = _sample(x.permute(0, 2, 3, 1), wide(spread) + self.dilation, taps)
        return out.to(x.dtype).permute(0, 3, 1, 2)

    def extra_repr(self):
        return f"{self.in_channels}, {self.out_channels}, offset_bound={self.offset_bound}, dilation={self.dilation}"


def _sample(x, radius, taps):
    """Sum of nine taps at distance `radius` [B, H, W]: x [B, H, W, C], taps [C, 9] -> [B, H, W, C].

    Whole and fractional part of the radius are apart: outwards the next pixel has the weight of the fraction.
    """
    B, H, W, C = x.shape
    x = wide(x)
    flat = F.pad(x, (0, 0, 1, 1, 1, 1)).flatten(1, 2)  # all that lies outside of the map is read from its border of 0
    whole = radius.detach().floor()
    fraction = (radius - whole).flatten(1)[..., None]
    near = whole.long()
    rows, columns = torch.arange(H, device=x.device)[:, None], torch.arange(W, device=x.device)
    images = torch.arange(B, device=x.device)[:, None]
    share = (1 - fraction, fraction)

    def read(dy, dx):
        """The pixels that lie dy, dx [B, H, W] away. A NaN made an integer is any number: it stays on the map, too."""
        at = ((rows + dy).clamp(-1, H) + 1) * (W + 2) + (columns + dx).clamp(-1, W) + 1
        return flat[images, at.flatten(1)]

    out = x.flatten(1, 2) * taps[:, 4]
    for tap in range(9):
        i, j = tap // 3 - 1, tap % 3 - 1
        if i or j:
            value = 0
            for outer_y in range(2 if i else 1):
                for outer_x in range(2 if j else 1):
                    part = read(i * (near + outer_y), j * (near + outer_x))
                    part = part * share[outer_y] if i else part
                    value = value + (part * share[outer_x] if j else part)
            out = out + value * taps[:, tap]
    return out.unflatten(1, (H, W))
