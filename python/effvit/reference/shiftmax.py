"""shiftmax in readable PyTorch, and the shift exponential: the definitions. Integers, in int64."""

import torch

LARGEST = 2**31 - 1


def shift_exp(d: torch.Tensor, x0: int, n: int, half_bit: bool = True) -> torch.Tensor:
    """About -x0 * 2^n * exp(-d / x0) of d <= 0 in int64, by shifts: 2^n * -x0 at 0, -x0 / 2 * 2^(n - q) at q * x0.

    half_bit: the last bit of the remainder is halved after the left shift; else before it, which loses it.
    """
    d = d.clamp(min=n * x0)  # p <= d: what this cuts, the next clamp would
    p = (d + (d >> 1) - (d >> 4)).clamp(min=n * x0)
    q = torch.div(p, x0, rounding_mode="floor")
    r = p - q * x0  # x0 < r <= 0
    return ((r - 2 * x0) << (n - q)) >> 1 if half_bit else ((r >> 1) - x0) << (n - q)


def reciprocal(total: torch.Tensor) -> torch.Tensor:
    """(2^31 - 1) // min(total, 2^31 - 1) in int64."""
    return torch.div(LARGEST, total.clamp(max=LARGEST), rounding_mode="floor")


def saturate(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int64 -> dtype, its smallest and largest numbers beyond its ends."""
    info = torch.iinfo(dtype)
    return y.clamp(info.min, info.max).to(dtype)


def shiftmax(x: torch.Tensor, *, x0: int, n: int, bits: int, half_bit: bool, out_dtype: torch.dtype) -> torch.Tensor:
    """Softmax over the last dim in steps of 2^(1 - bits): [..., C] -> [..., C]."""
    if x.shape[-1] == 0:
        return x.to(out_dtype)
    x = x.long()
    e = shift_exp(x - x.amax(-1, keepdim=True), x0, n, half_bit)
    return saturate(e * reciprocal(e.sum(-1, keepdim=True)) >> (32 - bits), out_dtype)
