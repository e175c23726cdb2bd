"""Im2win: convolutions that read windows where they lie, without a copy of every patch."""

import torch.nn.functional as F
from torch import nn

from ._ops import dwconv
from ._tokens import conv2d


def im2win(x, kernel_height, stride=1, dilation=1):
    """Im2win's arrangement of a map (arXiv:2306.14316): x [B, C, H, W] -> [B, C, H', W * kernel_height].

    Row y of the result holds the rows stride y + dilation r of x (r < kernel_height), column by column. So the window
    of any output is one piece of memory, and windows of neighbours share theirs: kernel_height / stride copies of x,
    where im2col has kernel_height * kernel_width / stride^2. ValueError where x has fewer rows than a window.
    """
    reach = dilation * (kernel_height - 1) + 1
    if x.shape[-2] < reach:
        raise ValueError(f"effvit::im2win: x must be [B, C, H, W] with H at least {reach}, got {list(x.shape)}")
    rows = x.unfold(-2, reach, stride)[..., ::dilation]  # [B, C, H', W, kernel_height], a view
    return rows.flatten(-2)


class Im2winConv2d(nn.Conv2d):
    """torch.nn.Conv2d (zeros as padding) by windows read in place (Im2win, arXiv:2306.14316): arguments and state_dict.

    A depthwise convolution with stride 1, whatever its padding, is `effvit::dwconv`, whose direct path keeps a row of
    windows in registers and copies nothing. Any other one multiplies, group by group, the windows of `im2win` with the
    kernel in the same order, as a convolution over one axis. x [B, in_channels, H, W] -> [B, out_channels, H', W'].

    ValueError where padding_mode is not "zeros". Compared with torch.nn.Conv2d; the published code is C++ (seth-lu/
    Im2win at 4a7fb9a) and has neither padding, groups nor dilation.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
        padding_mode="zeros", device=None, dtype=None,
    ):  # fmt: skip
        if padding_mode != "zeros":
            raise ValueError(f"effvit::Im2winConv2d: padding_mode must be 'zeros', got {padding_mode!r}")
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )

    def forward(self, x):
        if self.groups == self.in_channels == self.out_channels and self.stride == (1, 1):
            x = x.permute(0, 2, 3, 1)
            padding = {"same": None, "valid": (0, 0)}.get(self.padding, self.padding)
            y = dwconv(x, self.weight, self.bias, padding=padding, dilation=self.dilation)
            return y.permute(0, 3, 1, 2)
        left, right, top, bottom = self._reversed_padding_repeated_twice
        (h, w), (sy, sx), (dy, dx) = self.kernel_size, self.stride, self.dilation
        windows = im2win(F.pad(x, (left, right, top, bottom)), h, sy, dy)
        weight = self.weight.transpose(2, 3)  # column by column, as the windows
        if dx > 1:  # zeros in the columns between
            weight = F.pad(weight.unsqueeze(3), (0, 0, 0, dx - 1)).flatten(2, 3)[:, :, : dx * (w - 1) + 1]
        return conv2d(windows, weight.flatten(2).unsqueeze(2), self.bias, stride=(1, sx * h), groups=self.groups)
