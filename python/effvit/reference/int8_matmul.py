"""int8_matmul in readable PyTorch: the definition, and the ends of results. Integers, in int64."""

import torch

from .requantize import rescaled
from .shiftmax import saturate


def saturate_bits(y: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """int64 -> dtype, at most what `bits` hold."""
    bits = min(bits, torch.iinfo(dtype).bits)
    low, high = (0, 2**bits - 1) if dtype == torch.uint8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return y.clamp(low, high).to(dtype)


def exact_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in int64; float64 holds every sum below 2^53: of products of int16 up to K = 2^23."""
    return (a.double() @ b.double()).long()


def int8_matmul(a, b, *, transpose_b=False, multiplier=0, shift=0, bits=32, out_dtype=torch.int32):
    """a [..., M, K] b [..., K, N] -> [..., M, N]: the exact sum, saturating at int32, then times m / 2^c."""
    y = saturate(exact_product(a, b.transpose(-1, -2) if transpose_b else b), torch.int32).long()
    if multiplier:
        y = rescaled(y, multiplier, shift)
    return saturate_bits(y, bits, out_dtype)
