"""RepLKNet: large depthwise convolutions, trained beside small ones that are merged into them for inference."""

import torch
import torch.nn.functional as F
from torch import nn

from ._depthwise import batch_norm, depthwise_map, fold_norm, like_conv, merge_on_load
from ._tokens import convolve, is_hooked
from .swin_block import DropPath


class ConvNorm(nn.Module):
    """A convolution without bias, BatchNorm and perhaps ReLU; RepLKNet's parameter names."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1, act=False, sync=False, factory=None):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False, **factory
        )
        self.bn = batch_norm(out_channels, sync, factory)
        self.nonlinear = nn.ReLU() if act else nn.Identity()

    def forward(self, x):
        conv = self.conv
        x = depthwise_map(conv, x) if conv.groups == conv.in_channels > 1 else convolve(conv, x)
        return self.nonlinear(self.bn(x))


class ReparamLargeKernelConv(nn.Module):
    """RepLKNet's depthwise convolution (arXiv:2203.06717), a drop-in for its class: a large and a small kernel, summed.

    x [B, in_channels, H, W] -> [B, out_channels, H', W'] (H, W at stride 1), channels last::

        out = bn(conv_large(x)) + bn(conv_small(x))

    `small_kernel` is an odd size or None. `reparameterize()`, `merge_kernel()` in the original, makes one convolution
    with a bias (`lkb_reparam`) of it, for evaluation; `small_kernel_merged=True` constructs that, and takes state_dicts
    of merged layers or of trained ones, which it merges (in float64) when it loads them. groups = in_channels =
    out_channels at stride 1 is what the operator takes, others run in PyTorch.

    Compared with DingXiaoH/RepLKNet-pytorch, replknet.py at b76808a. Differences: nothing is printed; sizes are odd,
    ValueError otherwise (the original pads even ones to another size); `sync_bn` in place of a global switch.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride, groups, small_kernel, small_kernel_merged=False,
        sync_bn=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        name = "effvit::ReparamLargeKernelConv"
        if kernel_size % 2 == 0:
            raise ValueError(f"{name}: kernel_size must be odd, got {kernel_size}")
        if small_kernel is not None and not (0 < small_kernel <= kernel_size and small_kernel % 2):
            raise ValueError(f"{name}: small_kernel must be odd and at most {kernel_size}, got {small_kernel}")
        factory = {"device": device, "dtype": dtype}
        self.kernel_size = kernel_size
        self.small_kernel = small_kernel
        if small_kernel_merged:
            self.lkb_reparam = nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, **factory
            )
        else:
            options = {"stride": stride, "groups": groups, "sync": sync_bn, "factory": factory}
            self.lkb_origin = ConvNorm(in_channels, out_channels, kernel_size, **options)
            if small_kernel is not None:
                self.small_conv = ConvNorm(in_channels, out_channels, small_kernel, **options)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):  # fmt: skip
        like = "lkb_origin.conv.weight"
        if hasattr(self, "lkb_reparam") and prefix + like in state_dict:
            conv = self.lkb_reparam
            args = (conv.in_channels, conv.out_channels, self.kernel_size, conv.stride, conv.groups, self.small_kernel)
            merge_on_load(state_dict, prefix, like, lambda: ReparamLargeKernelConv(*args), error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip

    def forward(self, x):
        if hasattr(self, "lkb_reparam"):
            return depthwise_map(self.lkb_reparam, x)
        y = self.lkb_origin(x)
        return y + self.small_conv(x) if hasattr(self, "small_conv") else y

    @torch.no_grad()
    def reparameterize(self):
        """Merges, in float64, both branches with their norms' running statistics; nothing where that has been done.

        ValueError where a norm has none.
        """
        if hasattr(self, "lkb_reparam"):
            return
        name, large, sources = type(self).__name__, self.lkb_origin, [*self.parameters()]
        weight, bias = fold_norm(name, large.bn, large.conv.weight)
        if hasattr(self, "small_conv"):
            small_weight, small_bias = fold_norm(name, self.small_conv.bn, self.small_conv.conv.weight)
            weight = weight + F.pad(small_weight, [(self.kernel_size - self.small_kernel) // 2] * 4)
            bias = bias + small_bias
            del self.small_conv
        self.lkb_reparam = like_conv(large.conv, weight, bias, *sources)
        del self.lkb_origin

    merge_kernel = reparameterize

    def extra_repr(self):
        return f"kernel_size={self.kernel_size}, small_kernel={self.small_kernel}"


class RepLKBlock(nn.Module):
    """RepLKNet's block (arXiv:2203.06717): x + pw2(relu(large_kernel(pw1(bn(x))))), a drop-in for its class.

    Same arguments, same state_dict, same `forward(x [B, in_channels, H, W])`, the result channels last. pw1 (with ReLU)
    and pw2 are 1 x 1 with BatchNorm, `large_kernel` is a `ReparamLargeKernelConv` of dw_channels. `reparameterize()`
    merges its kernels for evaluation; small_kernel_merged=True constructs the merged block.

    Compared with DingXiaoH/RepLKNet-pytorch, replknet.py at b76808a; see `ReparamLargeKernelConv`.
    """

    def __init__(
        self, in_channels, dw_channels, block_lk_size, small_kernel, drop_path=0.0, small_kernel_merged=False,
        sync_bn=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.pw1 = ConvNorm(in_channels, dw_channels, 1, act=True, sync=sync_bn, factory=factory)
        self.pw2 = ConvNorm(dw_channels, in_channels, 1, sync=sync_bn, factory=factory)
        self.large_kernel = ReparamLargeKernelConv(
            dw_channels, dw_channels, block_lk_size, 1, dw_channels, small_kernel, small_kernel_merged, sync_bn,
            **factory,
        )  # fmt: skip
        self.lk_nonlinear = nn.ReLU()
        self.prelkb_bn = batch_norm(in_channels, sync_bn, factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x):
        y, large, act = self.pw1(self.prelkb_bn(x)), self.large_kernel, self.lk_nonlinear
        merged = hasattr(large, "lkb_reparam") and type(act) is nn.ReLU
        if merged and not (is_hooked(large) or is_hooked(act)):
            y = depthwise_map(large.lkb_reparam, y, act="relu")
        else:
            y = act(large(y))
        return x + self.drop_path(self.pw2(y))

    def reparameterize(self):
        """See `ReparamLargeKernelConv.reparameterize`."""
        self.large_kernel.reparameterize()
