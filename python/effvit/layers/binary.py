"""One-bit layers (XNOR-Net, BiViT): BinaryLinear, its deployed form, and attention on bits from end to end."""

import torch
import torch.nn.functional as F
from torch import nn

import effvit.ops

from ..ops import _checks
from ..reference.int8_linear import ACTIVATIONS
from ._ops import as_parameter, asks_for_derivatives


def sign_ste(x: torch.Tensor) -> torch.Tensor:
    """-1 or 1 (0 counts as positive), with the clipped straight-through gradient: 1 where |x| <= 1, else 0."""
    clipped = x.clamp(-1, 1)
    return clipped + (torch.where(x >= 0, 1.0, -1.0).to(x.dtype) - clipped).detach()


def softmax_threshold(p: torch.Tensor) -> torch.Tensor:
    """BiViT's softmax-aware binarisation (arXiv:2211.07091), exactly: the threshold of every row [..., N] -> [...].

    A row becomes a * (p >= threshold). For n entries the best a is their mean, and of all sets the n largest are best;
    what is left, sum p^2 - (sum of the n largest)^2 / n, is least for the n that is chosen here, by sorting.
    """
    ordered = p.sort(-1, descending=True).values
    n = torch.arange(1, p.shape[-1] + 1, dtype=torch.float64, device=p.device)
    best = (ordered.double().cumsum(-1).square() / n).argmax(-1, keepdim=True)
    return ordered.gather(-1, best).squeeze(-1)


def binarise_softmax(p: torch.Tensor) -> torch.Tensor:
    """Probabilities as softmax_threshold rounds them, with the gradient straight through."""
    with torch.no_grad():
        on = p >= softmax_threshold(p)[..., None]
        scale = torch.where(on, p, 0.0).sum(-1, keepdim=True) / on.sum(-1, keepdim=True).clamp(min=1)
        rounded = on * scale
    return p + (rounded - p).detach()


class BinaryLinear(nn.Module):
    """A linear layer of binarised weights and inputs: ``act(sign(x) sign(W)ᵀ * mean|x| * scale + bias)``.

    `weight` is trained straight through its sign (the gradient is clipped where |w| > 1), as x is; mean|x|, one number
    a token, counts as a constant; `scale`, one an output channel, is BiViT's learnable weight scale and begins as
    mean|w|. Where no gradient is asked for, :func:`effvit.ops.binary_linear` computes it on bits. `deployed()` keeps
    nothing but the bits: a 32nd of the memory.
    """

    def __init__(self, in_features, out_features, bias=True, activation="none", device=None, dtype=None):
        super().__init__()
        _checks.index_of("BinaryLinear", "activation", activation, tuple(ACTIVATIONS))
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = nn.Parameter(self.weight.detach().abs().mean(1))

    @classmethod
    def from_linear(cls, linear, activation="none"):
        """The layer of an nn.Linear; it shares weight and bias, but for what a parametrisation makes."""
        layer = cls(linear.in_features, linear.out_features, False, activation, device="meta")
        layer.weight, layer.bias = as_parameter(linear.weight), as_parameter(linear.bias)
        layer.scale = nn.Parameter(layer.weight.detach().abs().mean(1))
        return layer

    def formula(self, x):
        """The same in floating point, differentiable."""
        y = F.linear(sign_ste(x), sign_ste(self.weight)) * (x.detach().abs().mean(-1, keepdim=True) * self.scale)
        return ACTIVATIONS[self.activation](y if self.bias is None else y + self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise _checks.value_error("BinaryLinear", "x", f"[..., {self.in_features}]", _checks.shape(x))
        if x.dtype == torch.float64 or asks_for_derivatives(x, self.weight, self.bias, self.scale):
            return self.formula(x)
        weight, _ = effvit.ops.sign_bits(self.weight)
        return _on_bits(x, weight, self.scale, self.bias, self.in_features, self.activation)

    @torch.no_grad()
    def deployed(self):
        """The layer without its float weight."""
        return PackedBinaryLinear(effvit.ops.sign_bits(self.weight)[0], self.scale, self.bias, self.in_features,
                                  self.activation)  # fmt: skip

    def extra_repr(self):
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


def _on_bits(x, weight, scale, bias, depth, activation):
    """A negative scale is its size and a weight of the other sign: ops take positive ones."""
    x = x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()
    bits, x_scale = effvit.ops.sign_bits(x)
    x_scale = x_scale.clamp(min=torch.finfo(torch.float32).tiny)  # rows of zeros: +1 times nothing
    scale = scale.detach().float()
    weight = torch.where(scale[:, None] < 0, ~weight, weight)
    size = scale.abs().clamp(min=torch.finfo(torch.float32).tiny)
    return effvit.ops.binary_linear(
        bits, weight, x_scale, size, bias, depth=depth, activation=activation, out_dtype=x.dtype
    )


class PackedBinaryLinear(nn.Module):
    """What BinaryLinear is deployed as: bits [out_features, ceil(in_features / 8)], scale, bias."""

    def __init__(self, weight, scale, bias, in_features, activation="none"):
        super().__init__()
        self.in_features, self.out_features, self.activation = in_features, weight.shape[0], activation
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.detach().float().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise _checks.value_error("PackedBinaryLinear", "x", f"[..., {self.in_features}]", _checks.shape(x))
        return _on_bits(x, self.weight, self.scale, self.bias, self.in_features, self.activation)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class BinaryAttention(nn.Module):
    """Self-attention on bits (BiViT): q, k, v are signs times scales, probabilities 0 or one number a row.

    q and k have a scale a token, v a scale a channel, each the mean of the absolute values; probabilities are rounded
    by `softmax_threshold`. Gradients go straight through every rounding (clipped for signs), scales count as constants.
    Both products run on :func:`effvit.ops.binary_linear` where no gradient is asked for. Parameters are those of timm's
    Attention: qkv and proj, here one-bit layers unless `binary_projections` is False.
    """

    def __init__(self, dim, num_heads=8, qkv_bias=False, binary_projections=True):
        super().__init__()
        if dim % num_heads:
            raise _checks.value_error("BinaryAttention", "dim", f"a multiple of num_heads = {num_heads}", dim)
        make = BinaryLinear if binary_projections else nn.Linear
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = make(dim, 3 * dim, bias=qkv_bias)
        self.proj = make(dim, dim)

    def attend_formula(self, q, k, v):
        """q, k, v [B, h, N, d] in floating point, differentiable."""
        q, k = (sign_ste(t) * t.detach().abs().mean(-1, keepdim=True) for t in (q, k))
        v = sign_ste(v) * v.detach().abs().mean(-2, keepdim=True)
        return binarise_softmax((q @ k.transpose(-2, -1) * self.scale).softmax(-1)) @ v

    def attend_bits(self, q, k, v):
        """The same on bits."""
        ops, tiny, (b, h, n, d) = effvit.ops, torch.finfo(torch.float32).tiny, q.shape
        (q, qs), (k, ks), (v, vs) = (ops.sign_bits(t.contiguous()) for t in (q, k, v.transpose(-2, -1)))
        qs, ks, vs = (t.clamp(min=tiny) for t in (qs, ks, vs))
        out = torch.empty(b, h, n, d, device=q.device)
        for i in range(b):
            for j in range(h):
                scores = ops.binary_linear(q[i, j], k[i, j], qs[i, j], ks[i, j] * self.scale, depth=d)
                p = scores.softmax(-1)
                bits, scale = ops.sign_bits(p, softmax_threshold(p))
                out[i, j] = ops.binary_linear(bits, v[i, j], scale, vs[i, j], depth=n, unipolar=True)
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        exact = x.dtype == torch.float64 or asks_for_derivatives(qkv)
        y = (self.attend_formula if exact else self.attend_bits)(*qkv.unbind(0))
        return self.proj(y.to(x.dtype).transpose(1, 2).reshape(b, n, c))
