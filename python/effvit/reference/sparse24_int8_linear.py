"""sparse24_int8_linear in readable PyTorch: the definition."""

import torch

from .int8_linear import int8_linear
from .sparse24_compress import sparse24_decompress
from .sparse24_prepack import packed_width, sparse24_unpack

__all__ = ["dense_weight", "packed_width", "sparse24_int8_linear"]


def dense_weight(values, meta, n, k):
    """int8 [N, K] of the canonical form, or, without meta, of the packed one."""
    if meta is None:
        values, meta = sparse24_unpack(values, n, k)
    return sparse24_decompress(values, meta)


def sparse24_int8_linear(
    x, values, meta, x_scale, w_scale, bias=None, residual=None, *, activation="none", out_dtype=torch.float32,
    out_scale=None,
):  # fmt: skip
    """x int8 [M, K], a 2:4-sparse weight, x_scale [M], w_scale [N] -> [M, N]."""
    weight = dense_weight(values, meta, w_scale.shape[0], x.shape[1])
    options = {"activation": activation, "out_dtype": out_dtype, "out_scale": out_scale}
    return int8_linear(x, weight, x_scale, w_scale, bias, residual, **options)
