"""sparse24_int8_linear: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.int8_prepack import SPARSE24
from ..reference.sparse24_int8_linear import packed_width
from ..reference.sparse24_int8_linear import sparse24_int8_linear as _definition
from . import _int8
from ._checks import shape, value_error
from ._op import op
from ._sparse24 import check_meta


def _derive(op, dims, options, tensors):
    n, k, given = dims["N"], dims["K"], [dims["R"], dims["C"]]
    if k % 4:
        raise value_error(op, "x", "[M, K] with K a multiple of 4", shape(tensors["x"]))
    dims["K8"] = (k + 7) // 8
    plain, packed = [n, k // 2], [(n + 15) // 16, packed_width(k)]
    if tensors["meta"] is not None and given != plain:
        raise value_error(op, "values", f"[N, K / 2] = {plain} like w_scale and x", shape(tensors["values"]))
    if tensors["meta"] is None and given != packed:
        expected = f"packed by sparse24_prepack, {packed}, where meta is not given"
        raise value_error(op, "values", expected, shape(tensors["values"]))
    if tensors["meta"] is None and tensors["x"].is_cuda:
        raise value_error(op, "meta", "given on a GPU, beside values that are not packed", None)


def _check(op, dims, options, tensors):
    _int8.check(op, dims, options, tensors)
    if tensors["meta"] is not None:
        check_meta(op, dims, options, tensors)
    else:
        _int8.check_label(op, "values", tensors["values"], "sparse24_prepack", SPARSE24, dims["N"], dims["K"])


OP = op(
    "sparse24_int8_linear",
    f"x: M K | int8, values: R C | int8, meta?: N K8 | uint8 packed, {_int8.EPILOGUE} -> out: M N | out_dtype",
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
    flops=lambda dims, options: (dims["M"] * dims["N"] * dims["K"], 0),
)


def sparse24_int8_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    meta: torch.Tensor | None,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    out_scale: float | None = None,
) -> torch.Tensor:
    """:func:`effvit.ops.int8_linear` with a 2:4-sparse weight: of each four neighbours along K two are kept.

    Args:
        x: [..., K] int8, a last stride of 1; K a multiple of 4 from 0 to 131072.
        values, meta: the weight in the canonical form of :func:`effvit.ops.sparse24_compress`, [N, K / 2] int8 and
            [N, ceil(K / 8)] uint8; or the result of :func:`effvit.ops.sparse24_prepack` and None, which saves packing
            in every call on a CPU; GPUs take the canonical form. The result is the same.
        x_scale, w_scale, bias, residual, activation, out_dtype, out_scale: as of int8_linear.

    Returns:
        [..., N] in out_dtype, contiguous: what int8_linear returns for the decompressed weight.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride, device or option is outside the above; a nibble of meta is not two positions in
            ascending order; a scale is not positive and finite (where values can be read, on a CPU). The message names
            the argument.

    Source: 2:4 sparsity of int8 weights as GPUSQ-ViT (arXiv:2305.10727) deploys it.
    """
    return _int8.call(OP, x, (values, meta), x_scale, w_scale, bias, residual, activation, out_dtype, out_scale)
