"""SLAB: simplified linear attention, and the progressive re-parameterised BatchNorm with its fusion at inference."""

import torch
from torch import nn

from ._ops import linear_attention
from ._tokens import depthwise_over_heads, head_dim, same_padding, split_tokens, tokens_of
from .window_attention import pair


class SimplifiedLinearAttention(nn.Module):
    """SLA of SLAB's Swin, with the original's constructor and state_dict.

    relu(q) (relu(k + positional_encoding)^T v), normalised per query, plus a depthwise convolution of v whose weights
    all heads share. x: windows [nW*B, Wh*Ww, C] or maps [B, Wh, Ww, C]; the output has the shape of x. The original
    takes windows to be square; here the convolution sees the window as it is. `mask`, `qk_scale`, `attn_drop` and
    `focusing_factor` are accepted and unused, as in the original.

    Sources: SLAB (arXiv:2405.11582).
    """

    def __init__(
        self, dim, window_size, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0,
        focusing_factor=3, kernel_size=5, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.window_size = pair(window_size)
        self.num_heads = num_heads
        d = head_dim(self, dim, num_heads)
        self.focusing_factor = focusing_factor
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        padding = same_padding(self, "kernel_size", kernel_size)
        self.dwc = nn.Conv2d(d, d, kernel_size, padding=padding, groups=d, **factory)
        tokens = self.window_size[0] * self.window_size[1]
        self.positional_encoding = nn.Parameter(torch.zeros(1, tokens, dim, **factory))

    def forward(self, x, mask=None):
        q, k, v = split_tokens(self.qkv(tokens_of(self, x, self.window_size)), 3, self.num_heads)
        k = (k + self.positional_encoding.unflatten(-1, (self.num_heads, -1))).to(v.dtype)
        out = linear_attention(q, k, v, eps=1e-6).flatten(2) + depthwise_over_heads(v, self.dwc, self.window_size)
        return self.proj_drop(self.proj(out)).view(x.shape)

    def extra_repr(self):
        return f"dim={self.dim}, window_size={self.window_size}, num_heads={self.num_heads}"


class Affine(nn.Module):
    """x * weight + bias per channel: what a `RepBN` in evaluation is."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x):
        return torch.addcmul(self.bias, x, self.weight)

    def extra_repr(self):
        return f"{self.weight.shape[0]}"


class RepBN(nn.Module):
    """Re-parameterised BatchNorm over the last dimension: BN(x) + alpha * x."""

    def __init__(self, channels, device=None, dtype=None):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.bn = nn.BatchNorm1d(channels, device=device, dtype=dtype)

    def forward(self, x):
        tokens = x.flatten(0, -2)
        return (self.bn(tokens) + self.alpha * tokens).view(x.shape)

    @torch.no_grad()
    def fuse(self):
        """The `Affine` that this module is in evaluation, computed in float64 and rounded once."""
        bn = self.bn
        mean, var, gamma, beta, alpha = (
            t.detach().cpu().double() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias, self.alpha)
        )
        scale = gamma / (var + bn.eps).sqrt()
        return Affine(*(t.to(bn.weight) for t in (scale + alpha, beta - mean * scale)))


class LinearNorm(nn.Module):
    """PRepBN: in training lambda * norm1(x) + (1 - lambda) * norm2(x), lambda falling linearly from r0 to 0 in `step`
    calls after `warm` calls of norm1 alone; in evaluation norm2(x).

    With the defaults LayerNorm gives way to RepBN. Constructor, state_dict and counters (buffers `warm`, `iter`,
    `total_step`) are the original's. Unlike the original, a call reads no counter back from the device, except during
    the `warm` calls, which torch.compile therefore does not take as one graph.
    """

    def __init__(
        self, dim, norm1=nn.LayerNorm, norm2=RepBN, warm=0, step=300000, r0=1.0, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        factory = {name: x for name, x in (("device", device), ("dtype", dtype)) if x is not None}
        self.register_buffer("warm", torch.tensor(warm, device=device))
        self.register_buffer("iter", torch.tensor(step, device=device))
        self.register_buffer("total_step", torch.tensor(step, device=device))
        self.warming = warm > 0  # whether the buffer `warm` may be positive
        self.r0 = r0
        self.norm1 = norm1(dim, **factory)
        self.norm2 = norm2(dim, **factory)

    def forward(self, x):
        if not self.training:
            return self.norm2(x)
        if self.warming:
            if self.warm > 0:
                self.warm.sub_(1)
                return self.norm1(x)
            self.warming = False
        weight = self.r0 * self.iter / self.total_step.clamp(min=1)
        # The sum of one number: torch.compile recomputes cheap operations in the backward, there from an `iter` that
        # has moved on; it keeps the result of this one.
        weight = weight.reshape(1).cumsum(0).squeeze(0)
        self.iter.copy_((self.iter - 1).clamp(min=0))
        return weight * self.norm1(x) + (1 - weight) * self.norm2(x)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, prefix, *args)
        warm = state_dict.get(prefix + "warm")
        if warm is not None and not warm.is_meta:
            self.warming = bool(warm > 0)

    def fuse(self):
        """The `Affine` that this module is in evaluation; norm2 must be a `RepBN`."""
        if not isinstance(self.norm2, RepBN):
            raise ValueError(f"effvit::LinearNorm: norm2 must be a RepBN to be fused, got {type(self.norm2).__name__}")
        return self.norm2.fuse()


def fuse_prepbn(module):
    """Replace, in place, every `LinearNorm` and `RepBN` inside `module` by its `Affine`; returns their names.

    For inference: the module and all inside it must be in evaluation. A norm under two names stays one module.
    """
    if isinstance(module, (LinearNorm, RepBN)):
        raise ValueError(
            "effvit::fuse_prepbn: module must contain LinearNorm or RepBN, got one itself: call its fuse()"
        )
    if any(m.training for m in module.modules()):
        raise ValueError("effvit::fuse_prepbn: module must be in evaluation, got training=True")
    fused, names = {}, []
    for name, parent in list(module.named_modules()):
        if parent in fused:  # a LinearNorm that is gone: its RepBN is not in the model any more
            continue
        for key, child in list(parent._modules.items()):
            if isinstance(child, RepBN) or (isinstance(child, LinearNorm) and isinstance(child.norm2, RepBN)):
                if child not in fused:
                    fused[child] = child.fuse().eval()
                setattr(parent, key, fused[child])
                names.append(f"{name}.{key}" if name else key)
    return names


@torch.no_grad()
def fold_affine(affine, linear):
    """One Linear equal to `linear(affine(x))`: W diag(weight) x + (W bias + b), rounded once.

    What SLAB does with a norm and the projection after it (qkv, fc1, the reduction of a patch merging): set the norm
    to nn.Identity() and the projection to this.
    """
    weight, w, b = (t.detach().cpu().double() for t in (linear.weight, affine.weight, affine.bias))
    bias = weight @ b
    if linear.bias is not None:
        bias += linear.bias.detach().cpu().double()
    folded = nn.Linear(
        linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype
    )  # fmt: skip
    folded.weight.copy_(weight * w)
    folded.bias.copy_(bias)
    return folded.train(linear.training)
