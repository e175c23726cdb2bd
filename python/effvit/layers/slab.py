"""SLAB: simplified linear attention, and the progressive re-parameterised BatchNorm with its fusion at inference."""

import torch
from torch import nn

from ._ops import linear_attention
from ._tokens import depthwise_over_heads, head_dim, same_padding, split_tokens, tokens_of
from ._written import LastRead
from .window_attention import pair


class SimplifiedLinearAttention(nn.Module):
    """SLA of SLAB's Swin, with the original's constructor and state_dict.

    relu(q) (relu(k + positional_encoding)^T v), normalised per query, plus a depthwise convolution of v whose weights
    all heads share. x: windows [nW*B, Wh*Ww, C] or maps [B, Wh, Ww, C]; the output has the shape of x. The original
    takes windows to be square; here the convolution sees the window as it is. `mask`, `qk_scale`, `attn_drop` and
    `focusing_factor` are accepted and unused, as in the original.

    Compared with SLAB (arXiv:2405.11582): xinghaochen/SLAB, classification/models/slab_swin.py at f58db00. Differs in
    float16 and bfloat16, where the original's attention is returned in float32.
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


def affine_of(rep_bn):
    """The `Affine` that a RepBN, this file's or SLAB's own, is in evaluation: computed in float64, rounded once."""
    bn, alpha = getattr(rep_bn, "bn", None), getattr(rep_bn, "alpha", None)
    is_bn = isinstance(bn, nn.modules.batchnorm._BatchNorm) and bn.affine and bn.running_mean is not None
    if not is_bn or not isinstance(alpha, torch.Tensor) or alpha.numel() != 1:
        raise ValueError(
            "effvit::fuse_prepbn: RepBN must have alpha [1] and bn, a BatchNorm with weight, bias and running "
            f"statistics, got alpha {alpha} and bn {bn}"
        )
    with torch.no_grad():
        mean, var, gamma, beta, alpha = (
            t.detach().cpu().double() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias, alpha)
        )
        scale = gamma / (var + bn.eps).sqrt()
        return Affine(*(t.to(bn.weight) for t in (scale + alpha, beta - mean * scale)))


class RepBN(nn.Module):
    """Re-parameterised BatchNorm over the last dimension: BN(x) + alpha * x.

    Compared with SLAB (arXiv:2405.11582): xinghaochen/SLAB, classification/models/prepbn.py at f58db00, which takes
    [B, N, C] alone.
    """

    def __init__(self, channels, device=None, dtype=None):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.bn = nn.BatchNorm1d(channels, device=device, dtype=dtype)

    def forward(self, x):
        tokens = x.flatten(0, -2)
        return (self.bn(tokens) + self.alpha * tokens).view(x.shape)

    def fuse(self):
        """The `Affine` that this module is in evaluation, computed in float64 and rounded once."""
        return affine_of(self)


class LinearNorm(nn.Module):
    """PRepBN: in training lambda * norm1(x) + (1 - lambda) * norm2(x), lambda falling linearly from r0 to 0 in `step`
    calls after `warm` calls of norm1 alone; in evaluation norm2(x).

    With the defaults LayerNorm gives way to RepBN. Compared with SLAB (arXiv:2405.11582): xinghaochen/SLAB,
    classification/models/prepbn.py at f58db00. Constructor, state_dict and counters (buffers `warm`, `iter`,
    `total_step`) are the original's, but a call reads no counter back from its device, except `warm` during the `warm`
    calls and in the call after something wrote to it (on a device, a write through `.data` goes unnoticed).

    torch.compile takes it as one graph at every stage. There norm2 takes part in the `warm` calls with weight 0: its
    buffers stay as they are, its parameters get gradients of zero instead of None.
    """

    def __init__(
        self, dim, norm1=nn.LayerNorm, norm2=RepBN, warm=0, step=300000, r0=1.0, device=None, dtype=None
    ):  # fmt: skip
        super().__init__()
        factory = {name: x for name, x in (("device", device), ("dtype", dtype)) if x is not None}
        self.register_buffer("warm", torch.tensor(warm, device=device))
        self.register_buffer("iter", torch.tensor(step, device=device))
        self.register_buffer("total_step", torch.tensor(step, device=device))
        self.zero = LastRead()  # of the buffer `warm`
        self.r0 = r0
        self.norm1 = norm1(dim, **factory)
        self.norm2 = norm2(dim, **factory)

    def forward(self, x):
        if not self.training:
            return self.norm2(x)
        if torch.compiler.is_compiling() or self.warm.is_meta or type(self.warm) is not torch.Tensor:
            return self.without_reading(x)
        if self.is_warming():
            self.warm.sub_(1)
            return self.norm1(x)
        weight = self.r0 * self.iter / self.total_step.clamp(min=1)
        self.iter.sub_(1).clamp_(min=0)
        return weight * self.norm1(x) + (1 - weight) * self.norm2(x)

    def is_warming(self):
        if self.zero.is_current(self.warm):
            return False
        warming = bool(self.warm > 0)
        if not warming:
            self.zero.remember(self.warm)
        return warming

    def without_reading(self, x):
        warming = self.warm > 0
        weight = torch.where(warming, 1.0, self.r0 * self.iter / self.total_step.clamp(min=1))
        # The sum of one number: torch.compile recomputes cheap operations in the backward, there from counters that
        # have moved on; it keeps the result of this one.
        weight = weight.reshape(1).cumsum(0).squeeze(0)
        # norm2 writes to copies: autograd saves the buffers that it sees, which must not change any more
        buffers = dict(self.norm2.named_buffers())
        written = {name: buffer.clone() for name, buffer in buffers.items()}
        out = weight * self.norm1(x) + (1 - weight) * torch.func.functional_call(self.norm2, written, (x,))
        for name, buffer in buffers.items():
            buffer.copy_(torch.where(warming, buffer, written[name]))
        self.iter.copy_(torch.where(warming, self.iter, (self.iter - 1).clamp(min=0)))
        self.warm.copy_((self.warm - 1).clamp(min=0))
        return out

    def fuse(self):
        """The `Affine` that this module is in evaluation; norm2 must be a `RepBN`."""
        if not isinstance(self.norm2, RepBN):
            raise ValueError(f"effvit::LinearNorm: norm2 must be a RepBN to be fused, got {type(self.norm2).__name__}")
        return self.norm2.fuse()


def rep_bn_of(module):
    """The RepBN that `module` is in evaluation, itself or as norm2 of a LinearNorm; None where it is none.

    SLAB's own classes are known by their names, for its repository has a copy of them per task.
    """
    if isinstance(module, LinearNorm) or type(module).__name__ == "LinearNorm":
        module = getattr(module, "norm2", None)
    return module if isinstance(module, RepBN) or type(module).__name__ == "RepBN" else None


def fuse_prepbn(module):
    """Replace, in place, every `LinearNorm` and `RepBN` inside `module` by its `Affine`; returns their names.

    Those of this package and those of SLAB's own code. For inference: the module and all inside it must be in
    evaluation. A norm under two names stays one module, a LinearNorm whose norm2 is no RepBN stays. ValueError where a
    RepBN has no affine BatchNorm with running statistics; then nothing was replaced.
    """
    if rep_bn_of(module) is not None:
        raise ValueError(
            "effvit::fuse_prepbn: module must contain LinearNorm or RepBN, got one itself: there is no parent in which "
            "to replace it"
        )
    if any(m.training for m in module.modules()):
        raise ValueError("effvit::fuse_prepbn: module must be in evaluation, got training=True")
    affines = {m: affine_of(rep_bn).eval() for m in module.modules() if (rep_bn := rep_bn_of(m)) is not None}
    names = []
    for name, parent in list(module.named_modules()):
        if parent in affines:  # a LinearNorm that is gone: its RepBN is not in the model any more
            continue
        for key, child in list(parent._modules.items()):
            if child in affines:
                setattr(parent, key, affines[child])
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
