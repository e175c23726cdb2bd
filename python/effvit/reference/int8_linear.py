"""int8_linear in readable PyTorch: the definition, and the epilogue that all int8 products share."""

import torch
import torch.nn.functional as F

from .int8_prepack import int8_unpack

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": lambda y: y * torch.sigmoid(y),  # the derivative of F.silu has no forward mode
}


def integer_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weightᵀ, exact: float64 holds every sum of int8 products up to K = 2^38."""
    return x.double() @ weight.double().transpose(0, 1)  # the TorchScript exporter has no mT


def epilogue(acc, x_scale, w_scale, bias, residual, *, activation="none", out_scale=None):
    """act(acc * x_scale * w_scale + bias + residual) / out_scale, before it is rounded: [M, N]."""
    y = acc.to(x_scale.dtype) * (x_scale[:, None] * w_scale)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if residual is not None:
        y = y + residual.to(y.dtype)
    y = ACTIVATIONS[activation](y)
    return y if out_scale is None else y / out_scale


def rounded(y: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """To the output's dtype: int8 to the nearest, ties to even, saturating."""
    return y.round().clamp(-128, 127).to(out_dtype) if out_dtype == torch.int8 else y.to(out_dtype)


def int8_linear(
    x, weight, x_scale, w_scale, bias=None, residual=None, *, activation="none", out_dtype=torch.float32,
    out_scale=None,
):  # fmt: skip
    """x int8 [M, K], weight int8 [N, K] or packed, x_scale [M], w_scale [N] -> [M, N]; int32: the sums themselves."""
    if weight.shape[1] > x.shape[1]:
        weight = int8_unpack(weight, w_scale.shape[0], x.shape[1])
    acc = integer_product(x, weight)
    if out_dtype == torch.int32:
        return acc.to(torch.int32)
    y = epilogue(acc, x_scale, w_scale, bias, residual, activation=activation, out_scale=out_scale)
    return rounded(y, out_dtype) if out_dtype == torch.int8 else y
