"""block_sparse_int8_linear in readable PyTorch: the definition."""

import torch

from .block_sparse_linear import dense_weight
from .int8_linear import int8_linear


def block_sparse_int8_linear(
    x, values, crow, columns, x_scale, w_scale, bias=None, residual=None, *, activation="none",
    out_dtype=torch.float32, out_scale=None,
):  # fmt: skip
    """int8_linear of the weight that the blocks are, with zeros for the others: [M, N]."""
    weight = dense_weight(values, crow, columns, x.shape[1])
    options = {"activation": activation, "out_dtype": out_dtype, "out_scale": out_scale}
    return int8_linear(x, weight, x_scale, w_scale, bias, residual, **options)
