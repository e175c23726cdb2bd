"""binary_linear in readable PyTorch: the definition."""

import torch

from .int8_linear import epilogue, integer_product, rounded
from .sign_bits import unpack_bits


def binary_product(x: torch.Tensor, weight: torch.Tensor, depth: int, unipolar: bool) -> torch.Tensor:
    """Exact sums over `depth` bits: weight bits stand for -1 and 1, those of x likewise or, unipolar, for 0 and 1."""
    x, weight = (unpack_bits(t, depth).double() for t in (x, weight))
    return integer_product(x if unipolar else 2 * x - 1, 2 * weight - 1)


def binary_linear(
    x, weight, x_scale, w_scale, bias=None, residual=None, *, depth, unipolar=False, activation="none",
    out_dtype=torch.float32, out_scale=None,
):  # fmt: skip
    """x uint8 [M, V], weight uint8 [N, V], x_scale [M], w_scale [N] -> [M, N]; int32: the sums themselves."""
    acc = binary_product(x, weight, depth, unipolar)
    if out_dtype == torch.int32:
        return acc.to(torch.int32)
    y = epilogue(acc, x_scale, w_scale, bias, residual, activation=activation, out_scale=out_scale)
    return rounded(y, out_dtype) if out_dtype == torch.int8 else y
