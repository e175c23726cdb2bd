"""Integer row-wise operators in Triton: a program a row, pass by pass; functions that they need. No floating point."""

import torch

from ._common import MAX_GRID, Launch, device_function, next_power_of_two, run, tl, tuned
from ._rows import rows_of

OUT_DTYPES = {3: torch.int32, 4: torch.int8, 5: torch.uint8, 6: torch.int16}
MAX_BLOCK = 4096
LARGEST = tl.constexpr(2**31 - 1)
SMALLEST = tl.constexpr(-(2**31))


@device_function
def _shift_exp(u, X, n, HALF_BIT: tl.constexpr):
    """The shift exponential of -u, int64 and not negative, in int32: see csrc/rows/int_math.h."""
    limit = n * X
    u = tl.minimum(u, limit.to(tl.int64)).to(tl.int32)
    p = tl.minimum(u + ((u + 1) >> 1) - ((u + 15) >> 4), limit)
    q = p // X
    r = p - q * X
    if HALF_BIT:
        return (((2 * X - r).to(tl.int64) << (n - q)) >> 1).to(tl.int32)
    return (X - ((r + 1) >> 1)) << (n - q)


@device_function
def _shift_exp_above(d, X, n, HALF_BIT: tl.constexpr):
    """Of d > 0, in int64: the quotient is negative, and the result 2^31 - 1 where it would be more."""
    p = tl.maximum(d, 0) + (tl.maximum(d, 0) >> 1) - (tl.maximum(d, 0) >> 4)
    q = (p + X - 1) // X
    left = tl.minimum(q + n, 33)
    a = 2 * X - (q * X - p)
    if not HALF_BIT:
        a = a & -2
    return tl.minimum((a << left) >> 1, LARGEST)


@device_function
def _rounded_shift(t, c):
    """t / 2^c in int64 to the nearest, ties to even; 1 <= c <= 61, |t| <= 2^62."""
    one = t * 0 + 1
    return (t + (one << (c - 1)) - 1 + ((t >> c) & 1)) >> c


@device_function
def _between(y, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.minimum(tl.maximum(y, LOW), HIGH)


def ends(dtype, bits=32):
    """The smallest and the largest number of `bits` bits that the dtype has."""
    info = torch.iinfo(dtype)
    if info.min == 0:
        return 0, min(info.max, 2**bits - 1)
    return max(info.min, -(2 ** (bits - 1))), min(info.max, 2 ** (bits - 1) - 1)


def launch_int_rows(kernel, x, out_dtype, args):
    """(out, launches): `kernel` takes x, out, C, x_rows, BLOCK and `args`."""
    out = torch.empty(x.shape, dtype=OUT_DTYPES[out_dtype], device=x.device)
    if x.numel() == 0:
        return out, []
    columns = x.shape[-1]
    rows = x.numel() // columns
    if rows > MAX_GRID:
        raise ValueError(f"effvit::{kernel.__name__}: too many rows for one launch, got {rows}")
    block = min(next_power_of_two(max(columns, 16)), tuned(MAX_BLOCK, small=16))
    args = {**args, "x": x, "out": out, "C": columns, "x_rows": rows_of(x), "BLOCK": block}
    return out, [
        Launch(kernel, rows, {n: args[n] for n in kernel.arg_names}, num_warps=8 if block > 1024 else 4, num_stages=1)
    ]


def finish(planned, device):
    out, launches = planned
    run(launches, device)
    return out
