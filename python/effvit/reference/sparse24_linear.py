"""sparse24_linear in readable PyTorch: the definition."""

import torch

from .sparse24_compress import sparse24_decompress


def sparse24_linear(x, values, meta, bias=None) -> torch.Tensor:
    """x [..., K], a 2:4-sparse weight [N, K] as values [N, K / 2] and meta [N, ceil(K / 8)], bias [N] -> [..., N]."""
    return torch.nn.functional.linear(x, sparse24_decompress(values, meta), bias)
