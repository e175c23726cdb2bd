"""block_sparse_int8_linear: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.block_sparse_int8_linear import block_sparse_int8_linear as _definition
from . import _int8
from ._checks import shape, value_error
from ._op import op
from .block_sparse_linear import check_places, derive_blocks


def _derive(op, dims, options, tensors):
    derive_blocks(op, dims, tensors, "M")
    n = dims["R"] * dims["B"]
    if dims["N"] != n:
        raise value_error(op, "w_scale", f"[N] = [{n}] like crow and values", shape(tensors["w_scale"]))


def _check(op, dims, options, tensors):
    _int8.check(op, dims, options, tensors)
    check_places(op, tensors["crow"], tensors["columns"], dims["K"] // dims["B"])


OP = op(
    "block_sparse_int8_linear",
    "x: M K | int8, values: Z B B | int8, crow: R+1 | int32 packed, columns: Z | int32 packed,"
    f" {_int8.EPILOGUE} -> out: M N | out_dtype",
    _int8.OPTIONS,
    reference=lambda *tensors, **options: _definition(*tensors, **_int8.named(options)),
    saves=None,
    limits=_int8.LIMITS,
    derive=_derive,
    check=_check,
    empty="M N",
    batch="M",
    shards=("M",),
    autocast=False,
    flops=lambda dims, options: (2 * dims["M"] * dims["Z"] * dims["B"] ** 2, 0),
)


def block_sparse_int8_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    columns: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    out_scale: float | None = None,
) -> torch.Tensor:
    """:func:`effvit.ops.int8_linear` with a weight of which only some blocks of 16 x 16 or 32 x 32 are there.

    Args:
        x: [..., K] int8, a last stride of 1; K a multiple of B from 0 to 131072.
        values, crow, columns: the weight as of :func:`effvit.ops.block_sparse_linear`, values in int8: [Z, B, B],
            int32 [N / B + 1] and int32 [Z].
        x_scale, w_scale, bias, residual, activation, out_dtype, out_scale: as of int8_linear.

    Returns:
        [..., N] in out_dtype, contiguous: what int8_linear returns for the weight with zeros where no block is.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride, device or option is outside the above; crow or columns is no such description, or
            a scale is not positive and finite (where values can be read, on a CPU). The message names the argument.

    Source: block sparsity of ViTs as LPViT (arXiv:2407.02068) prunes it, with the int8 products of int8_linear.
    """
    readable = all(isinstance(t, torch.Tensor) and not t.is_nested for t in (values, crow, w_scale))
    if readable and w_scale.shape == (1,) and crow.dim() == 1 and values.dim():
        w_scale = w_scale.expand(max(crow.shape[0] - 1, 0) * values.shape[-1])
    weights = (values, crow, columns)
    return _int8.call(OP, x, weights, x_scale, w_scale, bias, residual, activation, out_dtype, out_scale)
