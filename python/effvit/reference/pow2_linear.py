"""pow2_linear in readable PyTorch: the definition, and the codes of weights that are powers of two."""

import torch

from .int8_linear import epilogue, rounded


def pow2_codes(w: torch.Tensor, exponent: torch.Tensor | int, bits: int) -> torch.Tensor:
    """The codes of sign(w) 2^round(log2 |w|), as int8: 0, or sign times 1 + the exponent above `exponent`, which
    broadcasts with w. Exponents are clamped to what `bits` can hold; what rounds to less than half of 2^exponent is 0.
    """
    size = w.detach().double().abs()
    p = torch.round(torch.log2(size)) - exponent
    code = (p.clamp(0, 2 ** (bits - 1) - 2) + 1) * torch.sign(w.detach())
    return torch.where((size > 0) & (p >= -1), code, torch.zeros_like(code)).to(torch.int8)


def pow2_values(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What codes stand for: 0, or sign times 2^(|code| - 1), exact."""
    c = codes.to(torch.int32)
    return torch.sign(c).to(dtype) * torch.where(c == 0, 0, 1 << (c.abs() - 1).clamp(min=0)).to(dtype)


def _exact_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x wᵀ of int64 x below 2^45, float64 w: integers below 2^14. In parts of 20 bits, whose sums float64 holds."""
    total, place = 0, 0
    while place < 45:
        part = x >> place
        part = part & 0xFFFFF if place + 20 < 45 else part
        total = total + ((part.double() @ w.transpose(0, 1)).to(torch.int64) << place)
        place += 20
    return total


def shift_sums(x: torch.Tensor, codes: torch.Tensor, bits: int, right: int) -> torch.Tensor:
    """sum over k of sign(code) floor(x 2^(|code| - 1 - right)), in int64: x [M, K], codes [N, K] -> [M, N]."""
    x, c = x.to(torch.int64), codes.to(torch.int32)
    left = torch.where(c.abs() > right, torch.sign(c) * (1 << (c.abs() - 1 - right).clamp(min=0)), 0)
    total = _exact_product(x, left.double())
    for size in range(1, min(right, 2 ** (bits - 1) - 1) + 1):
        of_size = torch.where(c.abs() == size, torch.sign(c), 0)
        total = total + _exact_product(x >> (right + 1 - size), of_size.double())
    return total


def pow2_linear(
    x, weight, x_scale, w_scale, bias=None, residual=None, *, bits=4, right=0, activation="none",
    out_dtype=torch.float32, out_scale=None,
):  # fmt: skip
    """x integers [M, K], weight codes int8 [N, K], x_scale [M], w_scale [N] -> [M, N]; int32: the sums themselves."""
    acc = shift_sums(x, weight, bits, right).clamp(-(2**31), 2**31 - 1)
    if out_dtype == torch.int32:
        return acc.to(torch.int32)
    y = epilogue(acc, x_scale, w_scale, bias, residual, activation=activation, out_scale=out_scale)
    return rounded(y, out_dtype) if out_dtype == torch.int8 else y
