"""Token sequences and maps: views between them, and convolutions on them."""

import torch
import torch.nn.functional as F
from torch import nn


def _slow_on_cpu():
    """Dtypes in which this CPU has no fast convolution: PyTorch's own are 10 to 300 times slower than float32."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return frozenset(dtype for dtype, supported in fast.items() if not supported())


SLOW_ON_CPU = _slow_on_cpu()


def _dtype_of_convolution(x):
    if x.device.type == "cpu" and x.dtype != torch.float64 and torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def is_slow(x):
    """Whether a convolution of x would be one of those in `SLOW_ON_CPU`."""
    return x.device.type == "cpu" and _dtype_of_convolution(x) in SLOW_ON_CPU


def conv2d(x, weight, bias, **geometry):
    """F.conv2d; where that is slow, computed in float32 and rounded once."""
    if not is_slow(x):
        return F.conv2d(x, weight, bias, **geometry)
    dtype = _dtype_of_convolution(x)
    with torch.autocast("cpu", enabled=False):
        return F.conv2d(x.float(), weight.float(), None if bias is None else bias.float(), **geometry).to(dtype)


def is_hooked(module):
    """Whether calling the module does more than its class's forward: then it has to be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def convolve(conv, x):
    """conv(x); where that is slow and conv is a plain Conv2d without hooks, computed in float32 and rounded once."""
    plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not is_hooked(conv)
    if not plain or not is_slow(x):
        return conv(x)
    return conv2d(
        x, conv.weight, conv.bias, stride=conv.stride, padding=conv.padding, dilation=conv.dilation,
        groups=conv.groups,
    )  # fmt: skip


def convolve_all(modules, x):
    """The modules of an nn.Sequential one after another, its convolutions by `convolve` where they are slow."""
    if not is_slow(x):
        return modules(x)
    for module in modules:
        x = convolve(module, x)
    return x


def convolve_tokens(conv, x, causal=True):
    """A depthwise nn.Conv1d over tokens [B, L, C] -> [B, L, C]: each sees itself and those before, or both sides."""
    reach = (conv.kernel_size[0] - 1) * conv.dilation[0]
    before = reach if causal else reach // 2
    y = F.pad(as_map(x, (1, x.shape[1])), (before, reach - before))
    weight = conv.weight.unsqueeze(2)
    return as_tokens(conv2d(y, weight, conv.bias, dilation=(1, conv.dilation[0]), groups=conv.groups))


def head_dim(module, dim, num_heads):
    """dim / num_heads; ValueError in the name of the module where it is no whole number."""
    if num_heads < 1 or dim % num_heads:
        name = type(module).__name__
        raise ValueError(f"effvit::{name}: dim must be a multiple of num_heads {num_heads}, got {dim}")
    return dim // num_heads


def same_padding(module, name, size):
    """The padding with which a convolution of kernel `size` keeps the map's size; ValueError where none does."""
    if size % 2 == 0:
        raise ValueError(f"effvit::{type(module).__name__}: {name} must be odd, got {size}")
    return size // 2


def split_tokens(x, parts, num_heads):
    """A packed projection [B, N, parts*h*d] -> `parts` views [B, N, h, d]."""
    return x.unflatten(-1, (parts, num_heads, -1)).unbind(2)


def as_map(x, size):
    """Tokens [B, H*W, C] -> a view [B, C, H, W], channels last where the tokens are contiguous."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def as_tokens(x):
    """A map [B, C, H, W] -> tokens [B, H*W, C], a view where the map is channels last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def depthwise_over_heads(x, conv, size):
    """Tokens [B, H*W, h, d] -> [B, H*W, h*d]: `conv` (depthwise, d channels) on every head with the same weights.

    One convolution of h*d channels on the map as it lies in memory, instead of a batch of B*h maps, which would need
    another memory layout.
    """
    heads = x.shape[2]
    bias = None if conv.bias is None else conv.bias.repeat(heads)
    y = conv2d(
        as_map(x.flatten(2), size), conv.weight.repeat(heads, 1, 1, 1), bias, padding=conv.padding,
        groups=heads * x.shape[3],
    )  # fmt: skip
    return as_tokens(y)


def tokens_of(module, x, size):
    """x [B, H*W, C] or [B, H, W, C] -> [B, H*W, C]; ValueError where it is not of the module's size (H, W)."""
    H, W = size
    if (x.dim() == 3 and x.shape[1] == H * W) or (x.dim() == 4 and tuple(x.shape[1:3]) == (H, W)):
        return x if x.dim() == 3 else x.flatten(1, 2)
    name = type(module).__name__
    raise ValueError(f"effvit::{name}: x must be [B, {H * W}, C] or [B, {H}, {W}, C], got {list(x.shape)}")
