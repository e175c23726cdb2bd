"""Layers of shifts and additions (DeepShift, ShiftAddViT): Pow2Linear, MatAdd, ShiftAddAttention."""

import math

import torch
import torch.nn.functional as F
from torch import nn

import effvit.ops

from ..ops import _checks
from ..reference.pow2_linear import pow2_codes, pow2_values
from ._ops import as_parameter

FORMS = ("int8", "fixed")


class Pow2Linear(nn.Module):
    """A linear layer whose weights are 0 or a sign times a power of two: ``x (sign 2^round(log2 |w|))ᵀ + bias``.

    `weight` is trained straight through the rounding. With `per_channel` the largest exponent of an output channel is
    that of its largest weight; else it is 0, and all are clamped to 2^-(2^(bits - 1) - 2) to 1: DeepShift's, with bits
    = 5 ShiftAddViT's. What rounds to less than half of the least power is 0. `deployed(form)` computes on integers.
    """

    def __init__(self, in_features, out_features, bias=True, bits=4, per_channel=True, device=None, dtype=None):
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.per_channel = _checks.as_int("Pow2Linear", "bits", bits, (2, 5)), per_channel
        self.weight, self.bias = linear.weight, linear.bias

    @classmethod
    def from_linear(cls, linear, bits=4, per_channel=True):
        """The layer of an nn.Linear; it shares weight and bias, but for what a parametrisation makes."""
        layer = cls(linear.in_features, linear.out_features, False, bits, per_channel, device="meta")
        layer.weight, layer.bias = as_parameter(linear.weight), as_parameter(linear.bias)
        return layer

    @torch.no_grad()
    def codes(self):
        """(codes int8 [N, K], the least exponent of every channel [N], float64): weights are value * 2^exponent."""
        span = 2 ** (self.bits - 1) - 2
        top = torch.zeros(self.out_features, dtype=torch.float64, device=self.weight.device)
        if self.per_channel:
            largest = self.weight.detach().double().abs().amax(1)
            top = torch.where(largest > 0, torch.round(torch.log2(largest)).clamp(-100, 100), top)
        return pow2_codes(self.weight, (top - span)[:, None], self.bits), top - span

    def powers(self):
        """The weights as they are rounded, with the gradient straight through."""
        codes, exponent = self.codes()
        rounded = pow2_values(codes, torch.float64) * torch.exp2(exponent)[:, None]
        return self.weight + (rounded.to(self.weight.dtype) - self.weight).detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.powers(), self.bias)

    def deployed(self, form="int8"):
        """The layer on integers: "int8", x rounded to int8, a scale a token; "fixed", x in fixed point, int32."""
        return DeployedPow2Linear(*self.codes(), self.bias, self.bits, form)

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, per_channel={self.per_channel}"
        )


class DeployedPow2Linear(nn.Module):
    """What Pow2Linear is deployed as. Form "int8": left shifts of int8, exact sums; "fixed": x * 2^fraction as int32,
    its right shifts rounded down one by one (MatShift)."""

    def __init__(self, codes, exponent, bias, bits, form="int8", fraction=16):
        super().__init__()
        _checks.index_of("DeployedPow2Linear", "form", form, FORMS)
        self.out_features, self.in_features = codes.shape
        self.bits, self.form, self.fraction = bits, form, fraction
        self.right = 2 ** (bits - 1) - 2 if form == "fixed" else 0
        self.register_buffer("weight", codes)
        self.register_buffer("scale", torch.exp2(exponent + self.right).float())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        packs = form == "int8" and bits <= 4 and codes.device.type == "cpu"
        packed = effvit.ops.int8_prepack(pow2_values(codes).to(torch.int8)) if packs else None
        self.register_buffer("packed", packed, persistent=False)

    def _apply(self, fn, recurse=True):
        scale = self.scale  # stays in float32, whatever the model is cast to
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.scale = scale.to(self.scale.device)
        return self

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        if self.packed is not None:
            self.packed = effvit.ops.int8_prepack(pow2_values(self.weight).to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.dtype == torch.float64  # the kernels end at float32
        dtype = torch.float32 if wide else x.dtype
        bias = self.bias if self.bias is None or self.bias.dtype != torch.float64 else self.bias.float()
        if self.form == "fixed":
            bound = 2.0**31 - 1
            q = torch.round(x.double() * 2.0**self.fraction).clamp(-bound - 1, bound).to(torch.int32)
            step = torch.full((1,), 2.0**-self.fraction, dtype=torch.float32, device=x.device)
            y = effvit.ops.pow2_linear(
                q, self.weight, step, self.scale, bias, bits=self.bits, right=self.right, out_dtype=dtype
            )
            return y.to(x.dtype)
        q, step = effvit.ops.quantize_int8(x.to(dtype))
        if self.packed is not None and x.device.type == "cpu":
            return effvit.ops.int8_linear(q, self.packed, step, self.scale, bias, out_dtype=dtype).to(x.dtype)
        y = effvit.ops.pow2_linear(q, self.weight, step, self.scale, bias, bits=self.bits, out_dtype=dtype)
        return y.to(x.dtype)


def _step(x, on):
    """1 where `on`, else 0, with the gradient of x clamped to between 0 and 1."""
    clipped = x.clamp(0, 1)
    return clipped + (on.to(x.dtype) - clipped).detach()


class MatAdd(nn.Module):
    """A product with a binary mask, nothing but sums: out[..., i, j] = sum of x[..., k, j] where mask[..., i, k] > 0
    (ShiftAddViT, arXiv:2306.06446).

    x of integers is summed exactly (in float64, to 2^53) and saturates at int32. Gradients: exact in x, straight
    through the comparison in a float mask where it is between 0 and 1.
    """

    def forward(self, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            binary = _step(mask.to(x.dtype), mask > 0) if mask.is_floating_point() else (mask > 0).to(x.dtype)
            return binary @ x
        sums = (mask > 0).double() @ x.double()
        return sums.clamp(-(2.0**31), 2.0**31 - 1).to(torch.int32)


class ShiftAddAttention(nn.Module):
    """ShiftAddViT's linear attention with binary queries and keys: both of its products are additions (MatAdd).

    q and k, normalised, become 1 above their mean and 0 elsewhere; ``y = v / 2 + q (kᵀ v) / pi``, normalised, plus a
    convolution of v over `res_kernel_size` tokens. `mean`: "tensor", over batch, heads, tokens and channels as in the
    authors' code, so that an image's result depends on the batch, or "token", over heads and channels. The
    projections are Pow2Linear with `shift_projections`. Parameters are named as in the authors' code: qkv, proj, dconv.
    Source: arXiv:2306.06446. Gradients of q and k pass the comparison where 0 <= q <= 1.
    """

    def __init__(
        self, dim, num_heads=8, qkv_bias=False, res_kernel_size=9, mean="tensor", shift_projections=False, bits=5
    ):  # fmt: skip
        super().__init__()
        name = "ShiftAddAttention"
        if dim % num_heads:
            raise _checks.value_error(name, "dim", f"a multiple of num_heads = {num_heads}", dim)
        _checks.index_of(name, "mean", mean, ("tensor", "token"))
        self.num_heads, self.mean = num_heads, mean
        make = (lambda *a, **o: Pow2Linear(*a, bits=bits, **o)) if shift_projections else nn.Linear
        self.qkv, self.proj = make(dim, 3 * dim, bias=qkv_bias), make(dim, dim)
        kernel, padding = (res_kernel_size, 1), (res_kernel_size // 2, 0)
        self.dconv = nn.Conv2d(num_heads, num_heads, kernel, padding=padding, bias=False, groups=num_heads)
        self.matadd = MatAdd()

    def binary(self, x):
        x = x / x.norm(dim=-1, keepdim=True)
        return _step(x, x > (x.mean((1, 3), keepdim=True) if self.mean == "token" else x.mean()))

    def forward(self, x: torch.Tensor, *_size) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.binary(q), self.binary(k)
        y = 0.5 * v + self.matadd(q, self.matadd(k.transpose(-2, -1), v)) / math.pi
        y = y / y.norm(dim=-1, keepdim=True) + self.dconv(v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))
