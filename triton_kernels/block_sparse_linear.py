"""block_sparse_linear in Triton: forward and backward.

Forward: a program computes a tile of rows by one row of blocks, a product for each block that is there. With a gradient
the same kernel makes g, the gradient of the sum. dx is the product with the blocks of each column of blocks; dvalues
and dbias are sums over rows, cut into pieces by the shape alone and added in a fixed order.
"""

import math

import torch

from ._common import Launch, _loop_bound, cdiv, device_function, run, sum_partials, tl, triton, tuned
from ._int8_epilogue import GELU, RELU, _activation
from ._rows import _exp
from ._tiles import _INTERPRETED

MAX_SPLITS = 16
TARGET_PROGRAMS = 512

# Sizes that change from call to call.
_SIZES = ["M", "Z", "step"]


@device_function
def _derivative(y, ACT: tl.constexpr):
    if ACT == RELU:
        d = tl.where(y > 0.0, 1.0, 0.0)
    elif ACT == GELU:
        density = 0.3989422804014327 * _exp(-0.5 * y * y)
        d = 0.5 + 0.5 * tl.erf(y * 0.7071067811865476) + y * density
    else:
        s = 1.0 / (1.0 + _exp(-y))
        d = s * (1.0 + y * (1.0 - s))
    return d


@device_function
def _load(pointer, mask):
    """An operand; zeros where there is nothing; float32 in the interpreter, which mistreats bfloat16."""
    x = tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=0.0)
    if _INTERPRETED:
        x = x.to(tl.float32)
    return x


@device_function
def _range_of(starts, block, Z):
    """Blocks of one row of blocks; within the blocks that there are, whatever starts says."""
    first = tl.maximum(tl.load(starts + block), 0)
    return first, tl.minimum(tl.load(starts + block + 1), Z)


@triton.jit(do_not_specialize=_SIZES[:2])
def block_sparse_linear_fwd_kernel(
    x,  # [M, K], last stride 1
    values,  # [Z, B, B], last stride 1
    crow,  # [N / B + 1] int32
    columns,  # [Z] int32
    bias,  # [N]; may be None
    residual,  # [M, N], last stride 1; may be None
    grad,  # [M, N], last stride 1; None: forward
    out,  # [M, N]; with grad: of the sum
    dresidual,  # [M, N]; may be None
    M, N, Z,
    across,  # K / B
    x_stride, values_stride_z, values_stride_i, residual_stride, grad_stride,
    ACT: tl.constexpr, B: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    down = N // B
    block = tl.program_id(0) % down
    row = tl.program_id(0) // down * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.arange(0, B)
    ok = (row < M)[:, None] & (i < B)[None, :]
    rows = row.to(tl.int64)[:, None]
    x_tiles = x + rows * x_stride + i[None, :]
    w_tiles = values + i[:, None] * values_stride_i + i[None, :]
    acc = tl.zeros([BLOCK_M, B], tl.float32)
    first, last = _range_of(crow, block, Z)
    for t in range(_loop_bound(first), _loop_bound(last)):
        column = tl.load(columns + t)
        inside = (column >= 0) & (column < across)
        x_tile = _load(x_tiles + column * B, ok & inside)
        w_tile = _load(w_tiles + tl.cast(t, tl.int64) * values_stride_z, None)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")
    channel = block * B + i
    if bias is not None:
        acc += tl.load(bias + channel).to(tl.float32)[None, :]
    if residual is not None:
        acc += tl.load(residual + rows * residual_stride + channel[None, :], mask=ok, other=0.0).to(tl.float32)
    if grad is None:
        acc = _activation(acc, ACT)
    else:
        g = tl.load(grad + rows * grad_stride + channel[None, :], mask=ok, other=0.0).to(tl.float32)
        acc = g * _derivative(acc, ACT)
    tl.store(out + rows * N + channel[None, :], acc.to(out.dtype.element_ty), mask=ok)
    if dresidual is not None:
        tl.store(dresidual + rows * N + channel[None, :], acc.to(dresidual.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_SIZES[:2])
def block_sparse_linear_bwd_dx_kernel(
    g,  # [M, N], last stride 1
    values,  # [Z, B, B], last stride 1
    starts,  # [K / B + 1] int32: where each column of blocks begins in
    places,  # [Z] int32: its blocks
    block_rows,  # [Z] int32: and the rows of blocks of these, in the order of places
    dx,  # [M, K]
    M, K, Z, g_stride, values_stride_z, values_stride_i,
    B: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    across = K // B
    block = tl.program_id(0) % across
    row = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.arange(0, B)
    ok = (row < M)[:, None] & (i < B)[None, :]
    g_tiles = g + row.to(tl.int64)[:, None] * g_stride + i[None, :]
    w_tiles = values + i[:, None] * values_stride_i + i[None, :]
    acc = tl.zeros([BLOCK_M, B], tl.float32)
    first, last = _range_of(starts, block, Z)
    for t in range(_loop_bound(first), _loop_bound(last)):
        g_tile = _load(g_tiles + tl.load(block_rows + t) * B, ok)
        w_tile = _load(w_tiles + tl.load(places + t).to(tl.int64) * values_stride_z, None)
        acc = tl.dot(g_tile, w_tile, acc, input_precision="ieee")
    target = dx + row.to(tl.int64)[:, None] * K + (block * B + i)[None, :]
    tl.store(target, acc.to(dx.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=_SIZES)
def block_sparse_linear_bwd_dvalues_kernel(
    g,  # [M, N], last stride 1
    x,  # [M, K], last stride 1
    columns,  # [Z] int32
    block_rows,  # [Z] int32
    partial,  # [splits, Z, B, B]
    M, Z, across, step, g_stride, x_stride,
    B: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    z = tl.program_id(0) % Z
    split = tl.program_id(0) // Z
    i = tl.arange(0, B)
    row = tl.arange(0, BLOCK_M)
    column = tl.load(columns + z)
    inside = (column >= 0) & (column < across)
    g_column = g + tl.load(block_rows + z) * B + i[None, :]
    x_column = x + column * B + i[None, :]
    acc = tl.zeros([B, B], tl.float32)
    first = split * step
    for start in range(_loop_bound(first), _loop_bound(tl.minimum(first + step, M)), BLOCK_M):
        at = (start + row).to(tl.int64)[:, None]
        ok = (start + row < M)[:, None] & (i < B)[None, :]
        g_tile = _load(g_column + at * g_stride, ok)
        x_tile = _load(x_column + at * x_stride, ok & inside)
        acc = tl.dot(tl.trans(g_tile), x_tile, acc, input_precision="ieee")
    target = partial + tl.program_id(0).to(tl.int64) * (B * B) + i[:, None] * B + i[None, :]
    tl.store(target, acc.to(partial.dtype.element_ty))


@triton.jit(do_not_specialize=["M", "step"])
def block_sparse_linear_bwd_dbias_kernel(
    g,  # [M, N], last stride 1
    partial,  # [splits, N] float32
    M, N, step, g_stride,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    column = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(0) // blocks
    row = tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_N], tl.float32)
    first = split * step
    for start in range(_loop_bound(first), _loop_bound(tl.minimum(first + step, M)), BLOCK_M):
        ok = (start + row < M)[:, None] & (column < N)[None, :]
        at = g + (start + row).to(tl.int64)[:, None] * g_stride + column[None, :]
        total += tl.sum(tl.load(at, mask=ok, other=0.0).to(tl.float32), axis=0)
    tl.store(partial + split.to(tl.int64) * N + column, total, mask=column < N)


def _rows_of(x):
    """[M, width]; a copy where the leading dims do not lie behind each other."""
    return None if x is None else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def rows_of_tile(M, blocks, dtype=None):
    """128 rows, of float32 32, halved down to 32 while there are few tiles; 16 of fewer rows."""
    m = tuned(32 if dtype == torch.float32 else 128, small=16)
    while m > 16 and (m // 2 >= M or (m > 32 and cdiv(M, m) * blocks < 2 * 128)):
        m //= 2
    return m


def _sum_arguments(x, values, crow, columns, bias, residual):
    """What is alike in forward and backward: arguments that describe the sum, and rows of a tile."""
    (M, K), block = x.shape, values.shape[-1]
    N = (crow.shape[0] - 1) * block
    args = {
        "x": x, "values": values, "crow": crow.contiguous(), "columns": columns.contiguous(),
        "bias": None if bias is None else bias.contiguous(), "residual": residual, "M": M, "N": N,
        "Z": values.shape[0], "across": K // block, "x_stride": x.stride(0), "values_stride_z": values.stride(0),
        "values_stride_i": values.stride(1), "residual_stride": None if residual is None else residual.stride(0),
        "B": block, "BLOCK_M": rows_of_tile(M, N // block, x.dtype),
    }  # fmt: skip
    return args, cdiv(M, args["BLOCK_M"]) * (N // block)


def _plan_forward(x, values, crow, columns, bias=None, residual=None, *, activation=0):
    """(out, launches). Works on meta tensors."""
    lead = x.shape[:-1]
    out = torch.empty((*lead, (crow.shape[0] - 1) * values.shape[-1]), dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out, []
    args, tiles = _sum_arguments(_rows_of(x), values, crow, columns, bias, _rows_of(residual))
    args |= {"grad": None, "grad_stride": None, "out": out, "dresidual": None, "ACT": activation}
    return out, [Launch(block_sparse_linear_fwd_kernel, tiles, args)]


def forward(x, values, crow, columns, bias=None, residual=None, *, activation=0):
    """effvit::block_sparse_linear. The arguments must have been validated."""
    out, launches = _plan_forward(x, values, crow, columns, bias, residual, activation=activation)
    run(launches, x.device)
    return out


def by_columns(crow, columns, across):
    """(starts, places, rows of blocks in that order, rows of blocks of all) of the blocks, column after column."""
    z = columns.shape[0]
    order = torch.arange(z, device=columns.device, dtype=torch.int32)
    block_rows = torch.searchsorted(crow[1:].contiguous(), order, right=True).clamp_(max=max(crow.shape[0] - 2, 0))
    sorted_columns, places = columns.sort(stable=True)
    edges = torch.arange(across + 1, device=columns.device, dtype=torch.int32)
    starts = torch.searchsorted(sorted_columns, edges)
    return tuple(t.to(torch.int32) for t in (starts, places, block_rows[places], block_rows))


def _plan_backward(grad_out, x, values, crow, columns, bias=None, residual=None, *, activation=0):
    """((dx, dvalues, dbias, dresidual), launches). Works on meta tensors."""
    block, (Z, N) = values.shape[-1], (values.shape[0], grad_out.shape[-1])
    new = lambda like: torch.empty(like.shape, dtype=like.dtype, device=like.device)
    dx, dvalues = new(x), torch.empty((Z, block, block), dtype=values.dtype, device=x.device)
    absent = torch.empty(0, device=x.device)
    dbias, dresidual = (absent if t is None else new(t) for t in (bias, residual))
    outs = (dx, dvalues, dbias, dresidual)
    if grad_out.numel() == 0:
        return tuple(t.zero_() for t in outs), []
    g, xs = _rows_of(grad_out), _rows_of(x)
    M, K = xs.shape
    launches = []
    if activation:
        args, tiles = _sum_arguments(xs, values, crow, columns, bias, _rows_of(residual))
        kept = torch.empty((M, N), dtype=x.dtype, device=x.device)
        args |= {"grad": g, "grad_stride": g.stride(0), "out": kept, "ACT": activation}
        args |= {"dresidual": None if residual is None else dresidual}
        launches.append(Launch(block_sparse_linear_fwd_kernel, tiles, args))
        g = kept
    elif residual is not None:
        dresidual.copy_(grad_out)
    across = K // block
    starts, places, ordered_rows, block_rows = by_columns(crow, columns, across)
    sizes = {"M": M, "g": g, "g_stride": g.stride(0)}
    if across:
        m = rows_of_tile(M, across, x.dtype)
        args = {
            "values": values, "starts": starts, "places": places, "block_rows": ordered_rows, "dx": dx, "K": K, "Z": Z,
            "values_stride_z": values.stride(0), "values_stride_i": values.stride(1), "B": block, "BLOCK_M": m,
        }  # fmt: skip
        launches.append(Launch(block_sparse_linear_bwd_dx_kernel, cdiv(M, m) * across, args | sizes))
    m = tuned(64, small=16)
    splits, step = _splits(M, max(Z, 1), m)
    if Z:
        partial = dvalues if splits == 1 else torch.empty((splits, Z, block, block), device=x.device)
        args = {
            "x": xs, "columns": columns.contiguous(), "block_rows": block_rows, "partial": partial, "Z": Z,
            "across": across, "step": step, "x_stride": xs.stride(0), "B": block, "BLOCK_M": m,
        }  # fmt: skip
        launches.append(Launch(block_sparse_linear_bwd_dvalues_kernel, splits * Z, args | sizes))
        if splits > 1:
            launches.append(sum_partials(partial, dvalues, splits))
    if bias is not None:
        width = tuned(64, small=16)
        splits, step = _splits(M, cdiv(N, width), m)
        partial = torch.empty((splits, N), device=x.device)
        args = {"partial": partial, "N": N, "step": step, "BLOCK_N": width, "BLOCK_M": m}
        launches.append(Launch(block_sparse_linear_bwd_dbias_kernel, splits * cdiv(N, width), args | sizes))
        launches.append(sum_partials(partial, dbias, splits))
    return outs, launches


def _splits(M, programs, m):
    """(pieces of the rows, rows of each) for so many programs a piece."""
    splits = max(1, min(MAX_SPLITS, tuned(TARGET_PROGRAMS, small=64) // programs, cdiv(M, 4 * m)))
    step = cdiv(cdiv(M, splits), m) * m
    return cdiv(M, step), step


def backward(grad_out, x, values, crow, columns, bias=None, residual=None, *, activation=0):
    """effvit::block_sparse_linear_backward. The arguments must have been validated."""
    outs, launches = _plan_backward(grad_out, x, values, crow, columns, bias, residual, activation=activation)
    run(launches, x.device)
    return outs


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    make = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device="meta")
    for name, (M, N, K, block) in {"vit": (12608, 1536, 384, 32), "image": (197, 384, 1536, 16)}.items():
        for dtype, act in ((torch.float32, 2), (torch.bfloat16, 1), (torch.float16, 3)):
            z = N * K // block**2 // 2
            args = (make(M, K, dtype=dtype), make(z, block, block, dtype=dtype), make(N // block + 1), make(z))
            grad, bias = make(M, N, dtype=dtype), make(N, dtype=dtype)
            for some, activation in ((None, 0), (make(M, N, dtype=dtype), act)):
                call = (*args, bias, some)
                launches = _plan_forward(*call, activation=activation)[1]
                launches += _plan_backward(grad, *call, activation=activation)[1]
                for launch in launches:
                    yield launch.aot(f"{name}-{str(dtype).removeprefix('torch.')}-{activation}")
