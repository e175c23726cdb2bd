"""sparse24_linear: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.sparse24_compress import sparse24_decompress, unpack_nibbles
from ..reference.sparse24_linear import sparse24_linear as _definition
from ._checks import shape, value_error
from ._op import op
from ._sparse24 import check_meta, derive_meta


def _derive(op, dims, options, tensors):
    derive_meta(op, dict(dims), options, tensors)
    if dims["K"] != 2 * dims["K2"]:
        expected = f"[..., K] with K = {2 * dims['K2']} like values {shape(tensors['values'])}"
        raise value_error(op, "x", expected, shape(tensors["x"]))


def _backward(grad_out, x, values, meta, bias):
    """dx = g W; of gᵀ x what is kept."""
    g = grad_out.float().reshape(-1, values.shape[0])
    xf = x.float().reshape(g.shape[0], x.shape[-1])
    dx = (g @ sparse24_decompress(values.float(), meta)).view_as(x)
    nibbles = unpack_nibbles(meta, values.shape[1] // 2)
    positions = torch.stack((nibbles & 3, nibbles >> 2), -1)
    dvalues = (g.mT @ xf).unflatten(1, (nibbles.shape[1], 4)).gather(-1, positions).flatten(1)
    return dx, dvalues, None if bias is None else g.sum(0)


def _flops(dims, options):
    """Products with what is kept; backward dx likewise, and all of gᵀ x."""
    dense = 2 * torch.Size(dims["..."]).numel() * dims["K"] * dims["N"]
    return dense // 2, dense // 2 + dense


OP = op(
    "sparse24_linear",
    "x: ... K, values: N K2 | strided, meta: N K8 | uint8 strided, bias?: N | float packed -> out: ... N",
    reference=_definition,
    backward=_backward,
    derive=_derive,
    check=check_meta,
    empty="... N",
    batch="...",
    shards=("...",),
    flops=_flops,
)


def sparse24_linear(
    x: torch.Tensor, values: torch.Tensor, meta: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear layer with a 2:4-sparse weight in floating point: ``x @ sparse24_decompress(values, meta).T + bias``.

    Args:
        x: [..., K], a last stride of 1; K a multiple of 4.
        values, meta: the weight in the canonical form of :func:`effvit.ops.sparse24_compress`, [N, K / 2] and
            [N, ceil(K / 8)] uint8, any strides. x and values float32, bfloat16 or float16 (one dtype).
        bias: [N] in any of these.

    Returns:
        [..., N] in the dtype of x, contiguous. Differentiable in x, values and bias: weights train in their places.
        Sums are float32. On a CPU the weight stays compressed up to the registers, in the forward and for the gradient
        of values, and results do not depend on the number of threads; AMX and GPUs (Triton) expand it tile by tile.
        CPUs with products of bfloat16 take subnormal numbers for zeros there. Under autocast x and values are cast.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride or device is outside the above, or four bits of meta are not two positions in
            ascending order (where values can be read, on a CPU). The message names the argument.
    """
    return OP(x, values, meta, bias)
