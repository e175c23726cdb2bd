"""int8_matmul in Triton: a program has a tile of a product.

Products are of int8: of the others, numbers are digits of seven bits, the highest one with the sign. Their products are
added in int32 where the whole sum fits, else in int64 after each part of K.
"""

import torch

from ._common import Launch, _loop_bound, cdiv, device_function, next_power_of_two, run, tl, triton, tuned
from ._gemm import GROUP, _row_pointers, _tile_at, tile_of, warps_of
from ._int_rows import LARGEST, OUT_DTYPES, SMALLEST, _between, _rounded_shift, check_grid, ends
from ._rows import _row_offsets, rows_of

DIGITS = {torch.int8: 1, torch.uint8: 2, torch.int16: 3}
MOST = {torch.int8: 128, torch.uint8: 255, torch.int16: 32768}


@device_function
def _digit(x, i: tl.constexpr, DIGITS: tl.constexpr):
    if DIGITS == 1:
        return x
    x = x.to(tl.int32) >> (7 * i)
    return (x if i == DIGITS - 1 else x & 127).to(tl.int8)


@triton.jit(do_not_specialize=["M", "N", "K", "multiplier", "shift"])
def int8_matmul_fwd_kernel(
    a,  # [..., M, K], last stride 1
    b,  # [..., K, N], or [..., N, K] with TRANSPOSED, last stride 1
    out,  # [..., M, N], contiguous
    M, N, K, a_batches, b_batches, a_row, b_row, multiplier, shift,
    TRANSPOSED: tl.constexpr, A_DIGITS: tl.constexpr, B_DIGITS: tl.constexpr, WIDE: tl.constexpr,
    RESCALED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles = ((M + BLOCK_M - 1) // BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row, column = _tile_at(tl.program_id(0) % tiles, M, N, BLOCK_M, BLOCK_N, GROUP)
    k = tl.arange(0, BLOCK_K)
    a_tiles = _row_pointers(a + _row_offsets(batch, a_batches), row, M, a_row) + k[None, :]
    b_start = b + _row_offsets(batch, b_batches)
    if TRANSPOSED:
        b_tiles = _row_pointers(b_start, column, N, b_row) + k[None, :]
    else:
        b_tiles = b_start + k.to(tl.int64)[:, None] * b_row + tl.minimum(column, N - 1)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int64 if WIDE else tl.int32)
    for start in range(0, _loop_bound(K), BLOCK_K):
        there = k < K - start
        x = tl.load(a_tiles + start, mask=there[None, :], other=0)
        if TRANSPOSED:
            y = tl.trans(tl.load(b_tiles + start, mask=there[None, :], other=0))
        else:
            y = tl.load(b_tiles + tl.cast(start, tl.int64) * b_row, mask=there[:, None], other=0)
        for i in tl.static_range(A_DIGITS):
            for j in tl.static_range(B_DIGITS):
                product = tl.dot(_digit(x, i, A_DIGITS), _digit(y, j, B_DIGITS), out_dtype=tl.int32)
                acc += product.to(acc.dtype) * (1 << (7 * (i + j)))
    y = _between(acc.to(tl.int64), SMALLEST, LARGEST)
    if RESCALED:
        y = _rounded_shift(y * multiplier, shift)
    to = out + (batch * M + row[:, None]) * N + column[None, :]
    tl.store(to, _between(y, LOW, HIGH).to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


def _plan_forward(a, b, *, transpose_b=False, multiplier=0, shift=0, bits=32, out_dtype=3):
    """(out, launches). Works on meta tensors."""
    (*lead, M, K), N = a.shape, b.shape[-2 if transpose_b else -1]
    dtype = OUT_DTYPES[out_dtype]
    out = torch.empty((*lead, M, N), dtype=dtype, device=a.device)
    if out.numel() == 0:
        return out, []
    if K == 0:
        return out.zero_(), []
    m, n = tile_of(M, N, most=64)
    low, high = ends(dtype, bits)
    args = {
        "a": a, "b": b, "out": out, "M": M, "N": N, "K": K, "a_batches": rows_of(a.select(-2, 0)),
        "b_batches": rows_of(b.select(-2, 0)), "a_row": a.stride(-2), "b_row": b.stride(-2), "multiplier": multiplier,
        "shift": shift, "TRANSPOSED": transpose_b, "A_DIGITS": DIGITS[a.dtype], "B_DIGITS": DIGITS[b.dtype],
        "WIDE": MOST[a.dtype] * MOST[b.dtype] * K >= 2**31, "RESCALED": multiplier != 0, "LOW": low, "HIGH": high,
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": max(32, min(tuned(64, small=32), next_power_of_two(K))), "GROUP": GROUP,
    }  # fmt: skip
    programs = out.numel() // (M * N) * cdiv(M, m) * cdiv(N, n)
    check_grid("int8_matmul", programs)
    return out, [Launch(int8_matmul_fwd_kernel, programs, args, num_warps=warps_of(m, n), num_stages=3)]


def forward(a, b, **options):
    """effvit::int8_matmul. The arguments must have been validated."""
    out, launches = _plan_forward(a, b, **options)
    run(launches, a.device)
    return out


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    calls = {
        "scores": ((8, 6, 197, 64), torch.int8, (8, 6, 197, 64), torch.int8, {"transpose_b": True}),
        "context": ((8, 6, 197, 197), torch.int16, (8, 6, 197, 64), torch.int8, {"multiplier": 2**30 + 3, "shift": 40}),
        "unsigned": ((50, 33), torch.uint8, (33, 100), torch.int8, {}),
        "wide": ((64, 1024), torch.int16, (1024, 64), torch.int16, {"multiplier": 2**30 + 3, "shift": 40}),
    }  # fmt: skip
    for name, (a_shape, a_dtype, b_shape, b_dtype, options) in calls.items():
        a, b = torch.empty(a_shape, dtype=a_dtype, device="meta"), torch.empty(b_shape, dtype=b_dtype, device="meta")
        for launch in _plan_forward(a, b, **options, out_dtype=4 if options.get("shift") else 3)[1]:
            yield launch.aot(name)
