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


@device_function
def _load_or(pointers, ok, OTHER: tl.constexpr):
    """Integers of any dtype in int32; OTHER where not ok, which their own dtype need not have."""
    return tl.where(ok, tl.load(pointers, mask=ok, other=0).to(tl.int32), OTHER)


@device_function
def _rescaled(pointers, multiplier, shift, ok):
    """z m / 2^c of integers of any dtype, rounded, in int64."""
    m = tl.load(multiplier, mask=ok, other=0).to(tl.int64)
    c = _between(tl.load(shift, mask=ok, other=1), 1, 61)
    return _rounded_shift(tl.load(pointers, mask=ok, other=0).to(tl.int64) * m, c)


FURTHEST = tl.constexpr(46340)  # from the mean: its square is below 2^31


@device_function
def _mean(total, C, TRUNCATE: tl.constexpr):
    """total / C: rounded towards 0, or to the nearest, ties to even."""
    size = tl.abs(total)
    mean = size // C
    if not TRUNCATE:
        rest = 2 * (size - mean * C)
        mean += tl.where((rest > C) | ((rest == C) & ((mean & 1) == 1)), 1, 0)
    return tl.where(total < 0, -mean, mean)


@device_function
def _reciprocal_root(v, EXACT: tl.constexpr):
    """(2^31 - 1) // sqrt(v), v int64."""
    if EXACT:
        k = v * 0
        for step in tl.static_range(0, 31):
            larger = k + (1 << (30 - step))
            k = tl.where(larger * larger <= v, larger, k)
        k = tl.maximum(k, 1)
    else:
        k = v * 0 + 65536
        for _step in tl.static_range(0, 10):
            k = (k + v // k) >> 1
    return LARGEST // k


@device_function
def _normalized(y, f, bias, multiplier, shift, offset, column, ok, TRUNCATE: tl.constexpr):
    """LayerNorm's result of y = x - mean, int64, before it saturates."""
    y = _between(y, -FURTHEST, FURTHEST) * f
    if TRUNCATE:
        y += tl.where(y < 0, 1, 0)
    y = y >> 1
    if bias is not None:
        y = _between(y + tl.load(bias + column, mask=ok, other=0).to(tl.int64), SMALLEST, LARGEST)
    if multiplier is not None:
        m = tl.load(multiplier + column, mask=ok, other=0).to(tl.int64)
        y = _rounded_shift(y * m, _between(tl.load(shift + column, mask=ok, other=1), 1, 61))
    if offset is not None:
        y = _between(y, SMALLEST, LARGEST) + tl.load(offset + column, mask=ok, other=0).to(tl.int64)
    return y


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


def check_grid(op, programs):
    if programs > MAX_GRID:
        raise ValueError(f"effvit::{op}: too many tiles for one launch, got {programs}")
