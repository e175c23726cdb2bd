"""sparse24_linear in Triton: matrix products with a weight that is expanded in registers, tile by tile.

Triton has no sparse product: this saves memory traffic, not arithmetic. Of the weight's gradient a program computes a
dense tile and writes what is kept. The rows are cut into shares for it, a number that follows from the shape alone;
`sum_partials` adds them in a fixed order.
"""

import torch

from ._common import Launch, _loop_bound, cdiv, run, sum_partials, tl, triton, tuned
from ._gemm import GROUP, TARGET_PROGRAMS, _row_pointers, _tile_at, tile_of, warps_of
from ._rows import _row_offsets, rows_of
from ._sparse24_tiles import _expand_floats, _load_positions, _load_values, _pick
from ._tiles import _rounded

MAX_SHARES = 32
ROWS_OF_SHARE = 512  # at least


@triton.jit
def _load(pointers, mask):
    """An operand of tl.dot; in float32 in the interpreter."""
    return _rounded(tl.load(pointers, mask=mask, other=0.0), pointers.dtype.element_ty)


@triton.jit
def _rows_at(pointer, row, rows, places):
    """Where rows start; those beyond the last one repeat it. `places` as rows_of returns them."""
    return pointer + _row_offsets(tl.minimum(row, rows - 1).to(tl.int64), places)[:, None]


@triton.jit
def _weights(values_rows, meta_rows, first, K2, K8, values_stride_k, meta_stride_k, BLOCK_K: tl.constexpr):
    """Columns [first, first + BLOCK_K) of the decompressed weight."""
    index = first // 2 + tl.arange(0, BLOCK_K // 2)
    kept = _load_values(values_rows, index, K2, values_stride_k)
    i0, i1 = _load_positions(meta_rows, first // 8 + tl.arange(0, BLOCK_K // 8), K8, meta_stride_k)
    return _expand_floats(_rounded(kept, kept.dtype), i0, i1)


@triton.jit(do_not_specialize=["M"])
def sparse24_linear_fwd_kernel(
    x,  # [M, K], last stride 1
    values,  # [N, K2]; K2 = K / 2
    meta,  # [N, K8] uint8; K8 = K / 8, rounded up
    bias,  # [N], or None
    out,  # [M, N], contiguous
    M, N, K, K2, K8, x_rows,
    values_stride_n, values_stride_k, meta_stride_n, meta_stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    k = tl.arange(0, BLOCK_K)
    x_tiles = _rows_at(x, row, M, x_rows) + k[None, :]
    values_rows = _row_pointers(values, column, N, values_stride_n)
    meta_rows = _row_pointers(meta, column, N, meta_stride_n)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, _loop_bound(tl.cdiv(K, BLOCK_K))):
        first = step * BLOCK_K
        x_tile = _load(x_tiles + first, (k < K - first)[None, :])
        w = _weights(values_rows, meta_rows, first, K2, K8, values_stride_k, meta_stride_k, BLOCK_K)
        acc = tl.dot(x_tile, tl.trans(w), acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    at = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def sparse24_linear_bwd_dx_kernel(
    grad_out,  # [M, N], last stride 1
    values, meta,  # as in the forward
    dx,  # [M, K], contiguous
    M, N, K, K2, K8, grad_rows,
    values_stride_n, values_stride_k, meta_stride_n, meta_stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _tile_at(tl.program_id(0), M, K, BLOCK_M, BLOCK_K, GROUP)
    first = tl.multiple_of(tl.min(column, axis=0), BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    grad_tiles = _rows_at(grad_out, row, M, grad_rows) + n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for step in range(0, _loop_bound(tl.cdiv(N, BLOCK_N))):
        channel = step * BLOCK_N + n
        g_tile = _load(grad_tiles + step * BLOCK_N, (channel < N)[None, :])
        values_rows = _row_pointers(values, channel, N, values_stride_n)
        meta_rows = _row_pointers(meta, channel, N, meta_stride_n)
        w = _weights(values_rows, meta_rows, first, K2, K8, values_stride_k, meta_stride_k, BLOCK_K)
        w = tl.where((channel < N)[:, None], w, tl.zeros_like(w))  # a reshaped operand does not compile for sm_100
        acc = tl.dot(g_tile, w, acc, input_precision="ieee")
    at = dx + row.to(tl.int64)[:, None] * K + column[None, :]
    tl.store(at, acc.to(dx.dtype.element_ty), mask=(row < M)[:, None] & (column < K)[None, :])


@triton.jit(do_not_specialize=["M", "rows", "shares"])
def sparse24_linear_bwd_dw_kernel(
    grad_out, x,  # [M, N] and [M, K], last stride 1
    meta,  # as in the forward
    dvalues,  # [shares, N, K2], contiguous
    dbias,  # [shares, N], or None
    M, N, K, K2, K8, rows, shares, grad_rows, x_rows,
    meta_stride_n, meta_stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0) % shares
    tile = tl.program_id(0) // shares
    k_tiles = tl.maximum(tl.cdiv(K, BLOCK_K), 1)
    first = tile % k_tiles * BLOCK_K
    channel = tile // k_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column = first + tl.arange(0, BLOCK_K)
    begin = share * rows
    end = tl.minimum(begin + rows, M)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for step in range(0, _loop_bound(tl.cdiv(end - begin, BLOCK_M))):
        row = begin + step * BLOCK_M + tl.arange(0, BLOCK_M)
        here = (row < end)[:, None]
        g_tile = _load(_rows_at(grad_out, row, M, grad_rows) + channel[None, :], here & (channel < N)[None, :])
        x_tile = _load(_rows_at(x, row, M, x_rows) + column[None, :], here & (column < K)[None, :])
        acc = tl.dot(tl.trans(g_tile), x_tile, acc, input_precision="ieee")
        if dbias is not None:
            total += tl.sum(g_tile.to(tl.float32), axis=0)
    meta_rows = _row_pointers(meta, channel, N, meta_stride_n)
    i0, i1 = _load_positions(meta_rows, first // 8 + tl.arange(0, BLOCK_K // 8), K8, meta_stride_k)
    index = first // 2 + tl.arange(0, BLOCK_K // 2)
    line = share.to(tl.int64) * N + channel
    mask = (channel < N)[:, None] & (index < K2)[None, :]
    at = dvalues + line[:, None] * K2 + index[None, :]
    tl.store(at, _pick(acc, i0, i1).to(dvalues.dtype.element_ty), mask=mask)
    if dbias is not None:
        tl.store(dbias + line, total.to(dbias.dtype.element_ty), mask=(channel < N) & (first == 0))


def _sizes(x, values, meta):
    K, N = x.shape[-1], values.shape[0]
    names = ("values_stride_n", "values_stride_k", "meta_stride_n", "meta_stride_k")
    strides = dict(zip(names, (*values.stride(), *meta.stride()), strict=True))
    return {"M": x.shape[:-1].numel(), "N": N, "K": K, "K2": K // 2, "K8": cdiv(K, 8)}, strides


def _most(dtype):
    """Sides of tiles: products of float32 are sums of products in registers."""
    return 64 if dtype == torch.float32 else 128


def _warps(dtype, m, n):
    """Sums of float32 products and their operands lie in registers: twice the threads share them."""
    return 8 if dtype == torch.float32 and m * n >= 32 * 64 else warps_of(m, n)


def _depth(dtype):
    return tuned(32 if dtype == torch.float32 else 64, small=16)


def _plan_forward(x, values, meta, bias=None):
    """(out, launches). Works on meta tensors."""
    sizes, strides = _sizes(x, values, meta)
    bias = None if bias is None else bias.contiguous()
    out = torch.empty((*x.shape[:-1], sizes["N"]), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out, []
    m, n = tile_of(sizes["M"], sizes["N"], _most(x.dtype))
    args = {
        "x": x, "values": values, "meta": meta, "bias": bias, "out": out, **sizes, "x_rows": rows_of(x), **strides,
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": _depth(x.dtype), "GROUP": GROUP,
    }  # fmt: skip
    tiles = cdiv(sizes["M"], m) * cdiv(sizes["N"], n)
    return out, [Launch(sparse24_linear_fwd_kernel, tiles, args, _warps(x.dtype, m, n))]


def _plan_backward(grad_out, x, values, meta, bias=None):
    """((dx, dvalues, dbias), launches). Works on meta tensors."""
    sizes, strides = _sizes(x, values, meta)
    M, N, K, K2 = (sizes[name] for name in ("M", "N", "K", "K2"))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dvalues = torch.empty((N, K2), dtype=x.dtype, device=x.device)
    dbias = None if bias is None else torch.empty(N, dtype=bias.dtype, device=x.device)
    if M == 0 or N == 0:
        return (dx, dvalues.zero_(), None if bias is None else dbias.zero_()), []
    launches = []
    if dx.numel() > 0:
        m, k = tile_of(M, K, _most(x.dtype))
        args = {
            "grad_out": grad_out, "values": values, "meta": meta, "dx": dx, **sizes, "grad_rows": rows_of(grad_out),
            **strides, "BLOCK_M": m, "BLOCK_N": _depth(x.dtype), "BLOCK_K": k, "GROUP": GROUP,
        }  # fmt: skip
        launches.append(Launch(sparse24_linear_bwd_dx_kernel, cdiv(M, m) * cdiv(K, k), args, _warps(x.dtype, m, k)))
    if dvalues.numel() == 0 and bias is None:
        return (dx, dvalues, dbias), launches
    n, k = tile_of(N, max(K, 1), 32 if x.dtype == torch.float32 else 64)  # more of float32 would spill
    tiles = cdiv(N, n) * max(1, cdiv(K, k))
    wanted = max(1, min(MAX_SHARES, cdiv(TARGET_PROGRAMS, tiles), M // tuned(ROWS_OF_SHARE, small=2)))
    rows = cdiv(M, wanted)
    shares = cdiv(M, rows)
    whole = shares == 1
    parts = {"dtype": torch.float32, "device": x.device}
    values_parts = dvalues if whole else torch.empty((shares, N, K2), **parts)
    bias_parts = dbias if whole or bias is None else torch.empty((shares, N), **parts)
    args = {
        "grad_out": grad_out, "x": x, "meta": meta, "dvalues": values_parts, "dbias": bias_parts, **sizes,
        "rows": rows, "shares": shares, "grad_rows": rows_of(grad_out), "x_rows": rows_of(x),
        "meta_stride_n": strides["meta_stride_n"], "meta_stride_k": strides["meta_stride_k"],
        "BLOCK_M": 16 if x.dtype == torch.float32 else _depth(x.dtype), "BLOCK_N": n, "BLOCK_K": k,
    }  # fmt: skip
    launches.append(Launch(sparse24_linear_bwd_dw_kernel, tiles * shares, args, _warps(x.dtype, n, k)))
    pairs = () if whole else ((values_parts, dvalues), (bias_parts, dbias))
    launches += [sum_partials(a, b, shares) for a, b in pairs if b is not None and b.numel() > 0]
    return (dx, dvalues, dbias), launches


def forward(x, values, meta, bias=None):
    """effvit::sparse24_linear. The arguments must have been validated."""
    out, launches = _plan_forward(x, values, meta, bias)
    run(launches, x.device)
    return out


def backward(grad_out, x, values, meta, bias=None):
    """effvit::sparse24_linear_backward. The arguments must have been validated."""
    (dx, dvalues, dbias), launches = _plan_backward(grad_out, x, values, meta, bias)
    run(launches, x.device)
    return dx, dvalues, torch.empty(0, device=x.device) if dbias is None else dbias


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for name, (M, N, K) in {"vit": (12608, 1536, 384), "image": (197, 384, 1536), "row": (1, 768, 768),
                            "odd": (3137, 100, 36)}.items():  # fmt: skip
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            x, values, grad, bias = (
                torch.empty(shape, dtype=dtype, device="meta") for shape in ((M, K), (N, K // 2), (M, N), (N,))
            )
            meta = torch.empty((N, cdiv(K, 8)), dtype=torch.uint8, device="meta")
            launches = _plan_forward(x, values, meta, bias)[1] + _plan_backward(grad, x, values, meta, bias)[1]
            for launch in launches:
                yield launch.aot(f"{name}-{short}")
