"""PAMLinear: a linear layer that is trained and run without multiplications (arXiv:2305.17190)."""

import torch
from torch import nn

import effvit.ops

from ..ops import _checks
from ..reference.pam_matmul import pam_matmul as _definition
from ._ops import as_parameter

DERIVATIVES = ("mimic", "exact")


def _product(x, weight):
    return (_definition if x.dtype == torch.float64 else effvit.ops.pam_matmul)(x, weight)


class _Mimic(torch.autograd.Function):
    """x weightᵀ by PAM; its derivatives are those of a product, by PAM as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        return _product(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        dx = _product(g.contiguous(), weight.t().contiguous()) if ctx.needs_input_grad[0] else None
        dw = _product(g.t().contiguous(), x.t().contiguous()) if ctx.needs_input_grad[1] else None
        return dx, dw

    @staticmethod
    def jvp(ctx, x_tangent, weight_tangent):
        x, weight = ctx.saved_tensors
        parts = [] if x_tangent is None else [_product(x_tangent.contiguous(), weight)]
        parts += [] if weight_tangent is None else [_product(x, weight_tangent.contiguous())]
        return sum(parts[1:], parts[0])


class PAMLinear(nn.Linear):
    """nn.Linear with piecewise affine multiplication, :func:`effvit.ops.pam_matmul`; parameters and state_dict are the
    same.

    derivative: "mimic", the gradients of a product with PAM in place of its multiplications, dx = pam(g, w) and dw =
    pam(g, x), which the authors train with and which runs on the same kernels; or "exact", that of the affine piece,
    dx = g sign(w) 2^p, a power of two that jumps from piece to piece, at the speed of PyTorch and with a tensor of all
    products in memory.
    """

    def __init__(self, in_features, out_features, bias=True, derivative="mimic", device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        _checks.index_of("PAMLinear", "derivative", derivative, DERIVATIVES)
        self.derivative = derivative

    @classmethod
    def from_linear(cls, linear, derivative="mimic"):
        """The layer of an nn.Linear; it shares weight and bias, but for what a parametrisation makes."""
        layer = cls(linear.in_features, linear.out_features, False, derivative, device="meta")
        layer.weight, layer.bias = as_parameter(linear.weight), as_parameter(linear.bias)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise _checks.value_error("PAMLinear", "x", f"[..., {self.in_features}]", _checks.shape(x))
        rows = x.reshape(-1, self.in_features)
        mimics = self.derivative == "mimic" and not torch.jit.is_tracing()  # a trace cannot save a function
        y = (_Mimic.apply if mimics else _product)(rows, self.weight)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self):
        return f"{super().extra_repr()}, derivative={self.derivative}"
