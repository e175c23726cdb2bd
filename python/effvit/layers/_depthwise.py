"""Depthwise convolutions of modules on maps, channels last, and how branches with norms become one of them."""

import torch
from torch import nn

from ._ops import dwconv
from ._tokens import convolve, is_hooked


def is_operators(conv):
    """Whether the operator computes what calling the module does: depthwise, stride 1, zeros around the map."""
    if type(conv) is not nn.Conv2d or is_hooked(conv) or conv.padding_mode != "zeros" or conv.stride != (1, 1):
        return False
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return depthwise and not isinstance(conv.padding, str) and _dilation(conv) is not None


def _dilation(conv):
    """One number where the taps of every axis with several of them have the same distance, else None."""
    found = {d for d, k in zip(conv.dilation, conv.kernel_size, strict=True) if k > 1}
    return found.pop() if len(found) == 1 else None if found else 1


def depthwise(conv, x):
    """conv(x) for a map x [B, H, W, C] -> [B, H', W', C]: by the operator, or by calling a conv that does more."""
    if not is_operators(conv):
        return convolve(conv, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return dwconv(x, conv.weight, conv.bias, padding=conv.padding, dilation=_dilation(conv))


def depthwise_map(conv, x):
    """conv(x) for x [B, C, H, W]; the result is channels last."""
    return depthwise(conv, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def fold_norm(name, norm, weight, bias=None):
    """(weight, bias) in float64 of a convolution or linear layer that a BatchNorm with running statistics follows."""
    if norm.running_var is None:
        raise ValueError(f"effvit::{name}: every BatchNorm must have running statistics, got one without")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
    return weight.double() * scale.view(-1, *(1,) * (weight.dim() - 1)), shift


def like_conv(conv, weight, bias):
    """A Conv2d with the geometry, device, dtype and mode of `conv` and these weights."""
    like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    made = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        **like,
    )  # fmt: skip
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made.train(conv.training)


def batch_norm(channels, sync, factory):
    return (nn.SyncBatchNorm if sync else nn.BatchNorm2d)(channels, **factory)
