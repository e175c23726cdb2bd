"""block_sparse_linear in readable PyTorch: the definition, and the form of block-sparse weights.

A weight [N, K] is cut into blocks of B x B; values [Z, B, B] are those that are there, row of blocks after row of
blocks, each with ascending columns of blocks. crow [N / B + 1] is where the rows of blocks begin, as in CSR.
"""

import math

import torch
import torch.nn.functional as F

from .int8_linear import ACTIVATIONS


def block_places(crow: torch.Tensor, columns: torch.Tensor, across: int) -> torch.Tensor:
    """Which of all blocks, row after row, `across` in a row, those that are there are: int64 [Z]."""
    order = torch.arange(columns.shape[0], device=columns.device, dtype=crow.dtype)
    rows = torch.searchsorted(crow[1:].contiguous(), order, right=True)
    return rows * across + columns


def dense_weight(values: torch.Tensor, crow: torch.Tensor, columns: torch.Tensor, k: int) -> torch.Tensor:
    """[N, K], with zeros where no block is."""
    block, down = values.shape[-1], crow.shape[0] - 1
    across = k // block
    blocks = values.new_zeros(down * across, block, block).index_copy(0, block_places(crow, columns, across), values)
    return blocks.view(down, across, block, block).transpose(1, 2).reshape(down * block, k)


def kept_blocks(w: torch.Tensor, crow: torch.Tensor, columns: torch.Tensor, block: int) -> torch.Tensor:
    """The blocks of w [N, K] that are there: [Z, B, B]."""
    down, across = w.shape[0] // block, w.shape[1] // block
    blocks = w.view(down, block, across, block).transpose(1, 2).reshape(down * across, block, block)
    return blocks.index_select(0, block_places(crow, columns, across))


def _sum(x, weight, bias, residual):
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y if residual is None else y + residual.to(y.dtype)


def block_sparse_linear(x, values, crow, columns, bias=None, residual=None, *, activation="none"):
    """x [..., K], a block-sparse weight [N, K], bias [N], residual [..., N] -> act(x weightᵀ + bias + residual)."""
    return ACTIVATIONS[activation](_sum(x, dense_weight(values, crow, columns, x.shape[-1]), bias, residual))


# What the activations change by.
DERIVATIVES = {
    "none": lambda y: torch.ones_like(y),
    "relu": lambda y: (y > 0).to(y.dtype),
    "gelu": lambda y: torch.erfc(-y * 0.5**0.5) / 2 + y * torch.exp(-y * y / 2) * (2 * torch.pi) ** -0.5,
    "silu": lambda y: torch.sigmoid(y) * (1 + y * torch.sigmoid(-y)),
}


def block_sparse_linear_backward(grad_out, x, values, crow, columns, bias=None, residual=None, *, activation="none"):
    """dx, dvalues, dbias, dresidual: gᵀ x is made in one piece, of which the blocks that are there are kept."""
    k, n, rows = x.shape[-1], grad_out.shape[-1], math.prod(x.shape[:-1])
    weight, g = dense_weight(values, crow, columns, k), grad_out
    if activation != "none":
        g = g * DERIVATIVES[activation](_sum(x, weight, bias, residual))
    xs, flat = x.reshape(rows, k), g.reshape(rows, n)
    dvalues = kept_blocks(flat.mT @ xs, crow, columns, values.shape[-1])
    dbias, dresidual = (None if bias is None else flat.sum(0)), (None if residual is None else g)
    return (flat @ weight).view_as(x), dvalues, dbias, dresidual
