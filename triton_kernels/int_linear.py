"""int_linear in Triton: the int8 product of int8_linear, and the epilogue of integers in registers.

A program computes a tile of the result. Weights are plain: the packed format serves the instructions of CPUs.
"""

from typing import Any, NamedTuple

import torch

from ._common import Launch, _loop_bound, cdiv, device_function, run, tl, triton
from ._gemm import GROUP, _row_pointers, _tile_at, depth_of, tile_of, warps_of
from ._int_rows import OUT_DTYPES, _between, _rounded_shift, ends


class Epilogue(NamedTuple):
    """The epilogue's tensors as one kernel argument; absent ones are None."""

    multiplier: Any  # [N] int32, as all vectors
    shift: Any
    bias: Any
    residual: Any  # [M, N] of integers, last stride 1
    residual_stride: Any
    residual_multiplier: Any
    residual_shift: Any
    out: Any  # [M, N], contiguous


@device_function
def _rescaled(z, multiplier, shift, column, N):
    """z m / 2^c of int64 z, rounded; the constants are those of the columns."""
    m = tl.load(multiplier + column, mask=column < N, other=0).to(tl.int64)
    c = _between(tl.load(shift + column, mask=column < N, other=1), 1, 61)
    return _rounded_shift(z * m[None, :], c.to(tl.int64)[None, :])


@device_function
def _finish(acc, e, row, column, M, N, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Stores rows and columns of the result below M and N, from the exact sums."""
    ok = (row < M)[:, None] & (column < N)[None, :]
    y = acc.to(tl.int64)
    if e.bias is not None:
        y += tl.load(e.bias + column, mask=column < N, other=0).to(tl.int64)[None, :]
        y = _between(y, -2147483648, 2147483647)
    if e.multiplier is not None:
        y = _rescaled(y, e.multiplier, e.shift, column, N)
    if e.residual is not None:
        source = e.residual + row.to(tl.int64)[:, None] * e.residual_stride + column[None, :]
        z = tl.load(source, mask=ok, other=0).to(tl.int64)
        y += _rescaled(z, e.residual_multiplier, e.residual_shift, column, N)
    target = e.out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(target, _between(y, LOW, HIGH).to(e.out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["M"])
def int_linear_fwd_kernel(
    x,  # [M, K] int8, last stride 1
    weight,  # [N, K] int8, last stride 1
    e,  # Epilogue
    M, N, K,
    x_stride_m, weight_stride_n,
    LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    k = tl.arange(0, BLOCK_K)
    x_tiles = _row_pointers(x, row, M, x_stride_m) + k[None, :]
    w_tiles = _row_pointers(weight, column, N, weight_stride_n) + k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, _loop_bound(K), BLOCK_K):
        ok = (k < K - start)[None, :]
        x_tile = tl.load(x_tiles + start, mask=ok, other=0)
        w_tile = tl.load(w_tiles + start, mask=ok, other=0)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, out_dtype=tl.int32)
    _finish(acc, e, row, column, M, N, LOW, HIGH)


def _plan_forward(
    x, weight, multiplier=None, shift=None, bias=None, residual=None, residual_multiplier=None, residual_shift=None, *,
    bits=8, out_dtype,
):  # fmt: skip
    """(out, launches). Works on meta tensors."""
    (M, K), N = x.shape, weight.shape[0]
    vectors = (multiplier, shift, bias, residual_multiplier, residual_shift)
    multiplier, shift, bias, *of_residual = (None if t is None else t.contiguous() for t in vectors)
    out = torch.empty((M, N), dtype=OUT_DTYPES[out_dtype], device=x.device)
    if out.numel() == 0:
        return out, []
    stride = None if residual is None else residual.stride(0)
    low, high = ends(out.dtype, 32 if multiplier is None else bits)
    m, n = tile_of(M, N)
    warps = warps_of(m, n)
    if residual is not None and m * n > 64 * 64:  # registers of a thread: products have 64 bits
        n, warps = min(n, 64), 8
    args = {
        "x": x, "weight": weight, "e": Epilogue(multiplier, shift, bias, residual, stride, *of_residual, out),
        "M": M, "N": N, "K": K, "x_stride_m": x.stride(0), "weight_stride_n": weight.stride(0), "LOW": low,
        "HIGH": high, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": depth_of(K, x.stride(0), weight.stride(0)), "GROUP": GROUP,
    }  # fmt: skip
    return out, [Launch(int_linear_fwd_kernel, cdiv(M, m) * cdiv(N, n), args, warps, num_stages=3)]


def forward(x, weight, *tensors, **options):
    """effvit::int_linear. The arguments must have been validated; the weight is plain."""
    out, launches = _plan_forward(x, weight, *tensors, **options)
    run(launches, x.device)
    return out


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for name, (M, N, K) in {"vit": (12608, 1536, 384), "image": (197, 384, 1536), "row": (1, 768, 768),
                            "odd": (3137, 100, 33)}.items():  # fmt: skip
        x, weight = (torch.empty((rows, K), dtype=torch.int8, device="meta") for rows in (M, N))
        vector = torch.empty(N, dtype=torch.int32, device="meta")
        calls = {
            "raw": ((), {"bias": vector, "out_dtype": 3}),
            "int8": ((vector, vector, vector), {"out_dtype": 4}),
            "uint8-residual": (
                (vector, vector, None, torch.empty((M, N), dtype=torch.int8, device="meta"), vector, vector),
                {"out_dtype": 5},
            ),
            "int16-residual": (
                (vector, vector, vector, torch.empty((M, N), dtype=torch.int32, device="meta"), vector, vector),
                {"bits": 16, "out_dtype": 6},
            ),
        }
        for short, (tensors, options) in calls.items():
            for launch in _plan_forward(x, weight, *tensors, **options)[1]:
                yield launch.aot(f"{name}-{short}")
