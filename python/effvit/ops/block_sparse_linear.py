"""block_sparse_linear: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.block_sparse_linear import block_sparse_linear as _definition
from ..reference.block_sparse_linear import block_sparse_linear_backward as _backward_definition
from ..reference.int8_linear import ACTIVATIONS
from ._checks import check_tensor, has_readable_values, index_of, shape, value_error
from ._op import op

NAMES = tuple(ACTIVATIONS)  # the schema's int is an index into these
BLOCKS = (16, 32)


def derive_blocks(op, dims, tensors, rows) -> None:
    """B, K and the number of rows of blocks."""
    block = dims["B"]
    if block not in BLOCKS:
        raise value_error(op, "values", "[Z, B, B] with B 16 or 32", shape(tensors["values"]))
    if dims["K"] % block:
        expected = f"[{rows}, K] with K a multiple of {block} like values {shape(tensors['values'])}"
        raise value_error(op, "x", expected, shape(tensors["x"]))
    if dims["R"] < 0:
        raise value_error(op, "crow", "[N / B + 1]", shape(tensors["crow"]))


def _derive(op, dims, options, tensors):
    derive_blocks(op, dims, tensors, "...")
    dims["N"] = dims["R"] * dims["B"]


def check_places(op, crow, columns, across: int) -> None:
    """Rows of blocks in order, ascending columns in each, all of them in the weight; where the values can be read."""
    if not has_readable_values(crow) or not has_readable_values(columns):
        return
    z = columns.shape[0]
    if crow[0] != 0 or crow[-1] != z or (crow[1:] < crow[:-1]).any():
        raise value_error(op, "crow", f"ascending from 0 to {z} like columns {shape(columns)}", crow.tolist())
    outside = (columns < 0) | (columns >= across)
    if outside.any():
        at = int(outside.nonzero()[0])
        raise value_error(op, "columns", f"between 0 and {across - 1}", f"{columns[at].item()} at [{at}]")
    starts = torch.zeros(z + 1, dtype=torch.bool)
    starts[crow.long()] = True
    wrong = (columns[1:] <= columns[:-1]) & ~starts[1:z]
    if wrong.any():
        at = int(wrong.nonzero()[0])
        given = f"{columns[at].item()}, {columns[at + 1].item()} at [{at}]"
        raise value_error(op, "columns", "ascending in each row of blocks", given)


def _check(op, dims, options, tensors):
    check_places(op, tensors["crow"], tensors["columns"], dims["K"] // dims["B"])


def _backward(*tensors, activation):
    floats = (t.float() if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)
    return _backward_definition(*floats, activation=NAMES[activation])


def _flops(dims, options):
    """Products with the blocks that are there; backward twice as many, and with an activation the first again."""
    product = 2 * torch.Size(dims["..."]).numel() * dims["Z"] * dims["B"] ** 2
    return product, (3 if options["activation"] else 2) * product


OP = op(
    "block_sparse_linear",
    "x: ... K, values: Z B B, crow: R+1 | int32 packed, columns: Z | int32 packed, bias?: N | float packed,"
    " residual?: ... N | float -> out: ... N",
    "activation: int in 0..3 = 0",
    reference=lambda *tensors, activation: _definition(*tensors, activation=NAMES[activation]),
    backward=_backward,
    derive=_derive,
    check=_check,
    empty="... N",
    batch="...",
    shards=("...",),
    flops=_flops,
)


def block_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    crow: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "none",
) -> torch.Tensor:
    """A linear layer of whose weight only some blocks of 16 x 16 or 32 x 32 are there: ``act(x Wᵀ + bias + residual)``.

    Args:
        x: [..., K], a last stride of 1; K a multiple of B.
        values: [Z, B, B] in the dtype of x: the blocks, row of blocks after row of blocks, each in ascending columns;
            B 16 or 32; a last stride of 1. An entry [z, i, j] belongs to output channel i of its block, and input j.
        crow: int32 [N / B + 1]: where each row of blocks begins in values, and Z.
        columns: int32 [Z]: the place of each block along K, in blocks. `effvit.block_sparse.compress` makes all three.
        bias: [N]; residual: [..., N], a last stride of 1; each float32, bfloat16 or float16.
        activation: "none", "relu", "gelu" (with erf) or "silu", of the sum.

    Returns:
        [..., N] in the dtype of x, contiguous. Differentiable in x, values, bias and residual: weights train in their
        places. Computed in float32 and rounded once. Under autocast x and values are cast. Deterministic; results do
        not depend on the number of threads. Backward of an activation keeps one more [..., N] while it runs.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride, device or option is outside the above; crow or columns is no such description
            (where values can be read, on a CPU). The message names the argument.

    Source: block sparsity of ViTs as LPViT (arXiv:2407.02068) prunes it.
    """
    check_tensor(OP.name, "x", x)
    return OP(x, values, crow, columns, bias, residual, activation=index_of(OP.name, "activation", activation, NAMES))
