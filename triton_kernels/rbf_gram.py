"""Gram matrix of the Gaussian kernel in Triton: forward and backward.

Forward: a program computes a block of queries x keys, |q|^2 + |k|^2 - 2 q.k with everything but the operands of the
product in float32.

Backward: with P = grad_out * out, dq_i = -2 gamma (q_i sum_j P_ij - sum_j P_ij k_j), and dk with P transposed. A
program owns rows and a block of columns of one gradient and loops over the other side. dk is cut over the queries into
at most MAX_SPLITS pieces, a number that follows from the shape alone; `sum_partials` adds them in a fixed order.

Half precision rounds P for the product. The factor of q_i is the sum of the rounded P: the result is then the sum of
P_ij (q_i - k_j) with slightly different P, and the difference of two large sums costs nothing. |P| <= |grad_out|, so it
cannot overflow; in float16 it could underflow, so rows are scaled by powers of two.
"""

import torch

from ._common import (
    INTERPRETED,
    MAX_GRID,
    Launch,
    _loop_bound,
    cdiv,
    device_function,
    next_power_of_two,
    run,
    sum_partials,
    tl,
    triton,
    tuned,
)
from ._tiles import _share_of

BLOCK = 64  # rows of q and of k in a tile
# dk is cut into pieces until about so many programs run.
TARGET_PROGRAMS = 1024
MAX_SPLITS = 32

# Sizes that change from call to call; specialising on their values would only recompile.
_SIZES = ["heads", "L", "M", "l_blocks", "m_blocks", "units", "walk", "split_blocks", "splits"]


@device_function
def _offsets(row, stride, column, INDEX: tl.constexpr):
    """Offsets of a tile from its first row. A tile of 64-bit ones takes twice the registers, so they are 32-bit unless
    the launcher finds that they may overflow."""
    return row.to(INDEX)[:, None] * stride + column[None, :]


@device_function
def _load_tile(
    pointer, first, row, rows, stride, column, columns, INDEX: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Rows first + row and columns `column` of a matrix with last stride 1; zeros beyond rows x columns."""
    offset = _offsets(row, stride, column, INDEX)
    mask = (first + row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(pointer + tl.cast(first, tl.int64) * stride + offset, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@device_function
def _products(grad_out, out, first, row, rows, grad_out_stride, column, columns, out_stride, INDEX: tl.constexpr):
    """P = grad_out * out in float32."""
    grad = _load_tile(grad_out, first, row, rows, grad_out_stride, column, columns, INDEX, True)
    return grad * _load_tile(out, first, row, rows, out_stride, column, columns, INDEX, True)


@device_function
def _power_of_two(x):
    """2^(14 - e) for x in [2^e, 2^(e + 1)), both float32."""
    exponent = x.to(tl.int32, bitcast=True) >> 23
    return ((268 - exponent) << 23).to(tl.float32, bitcast=True)


@device_function
def _inverse_power(x):
    """1 / x for a power of two, exactly."""
    return ((254 << 23) - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@device_function
def _lower_scale(scale, largest):
    """The scale of rows whose largest |P| is `largest`: lowered where P would leave float16's range."""
    return tl.where(largest * scale >= 32768.0, _power_of_two(largest), scale)


@triton.jit(do_not_specialize=_SIZES)
def rbf_gram_fwd_kernel(
    q,  # [B, L, H, D], last stride 1
    k,  # [B, M, H, D], last stride 1
    out,  # [B, H, L, M], contiguous
    heads, L, M, l_blocks, m_blocks, units, walk,
    q_stride_b, q_stride_l, q_stride_h,
    k_stride_b, k_stride_m, k_stride_h,
    gamma,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
    INDEX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        unit = first + step
        first_key = (unit % m_blocks).to(tl.int32) * BLOCK_M
        unit = unit // m_blocks
        first_row = (unit % l_blocks).to(tl.int32) * BLOCK_L
        bh = (unit // l_blocks).to(tl.int64)
        b = bh // heads
        h = bh - b * heads
        q_head = q + b * q_stride_b + h * q_stride_h
        k_head = k + b * k_stride_b + h * k_stride_h
        row = tl.arange(0, BLOCK_L)
        key = tl.arange(0, BLOCK_M)
        dot = tl.zeros([BLOCK_L, BLOCK_M], tl.float32)
        q_norm = tl.zeros([BLOCK_L], tl.float32)
        k_norm = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            q_tile = _load_tile(q_head, first_row, row, L, q_stride_l, column, D, INDEX, UPCAST)
            k_tile = _load_tile(k_head, first_key, key, M, k_stride_m, column, D, INDEX, UPCAST)
            dot = tl.dot(q_tile, tl.trans(k_tile), dot, input_precision="ieee")
            q_float = q_tile.to(tl.float32)
            k_float = k_tile.to(tl.float32)
            q_norm += tl.sum(q_float * q_float, axis=1)
            k_norm += tl.sum(k_float * k_float, axis=1)
        distance = q_norm[:, None] + k_norm[None, :] - 2.0 * dot
        distance = tl.where(distance < 0.0, 0.0, distance)  # NaN stays NaN
        result = tl.exp(-gamma * distance).to(out.dtype.element_ty)
        mask = (first_row + row < L)[:, None] & (first_key + key < M)[None, :]
        tl.store(out + (bh * L + first_row) * M + first_key + _offsets(row, M, key, INDEX), result, mask=mask)


@device_function
def _add_products(p, acc, total, scale, x, ROWS: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr):
    """acc + P x, total + the sums of P, and the scale of both, for P (ROWS) or its transpose. The operand: P rounded to
    DTYPE, in float32 where x is: the interpreter's products are."""
    AXIS: tl.constexpr = 1 if ROWS else 0
    if SCALED:
        lower = _lower_scale(scale, tl.max(tl.abs(p), axis=AXIS))
        ratio = lower * _inverse_power(scale)
        acc = acc * ratio[:, None]
        total = total * ratio
        scale = lower
        p = p * (scale[:, None] if ROWS else scale[None, :])
    p = p.to(DTYPE)
    total += tl.sum(p.to(tl.float32), axis=AXIS)
    p = p.to(x.dtype)
    acc = tl.dot(p if ROWS else tl.trans(p), x, acc, input_precision="ieee")
    return acc, total, scale


@device_function
def _gradient(acc, total, scale, x, gamma, SCALED: tl.constexpr):
    """-2 gamma (x_i sum_j P_ij - sum_j P_ij y_j)."""
    if SCALED:
        inverse = _inverse_power(scale)
        acc = acc * inverse[:, None]
        total = total * inverse
    return -2.0 * gamma * (total[:, None] * x.to(tl.float32) - acc)


@triton.jit(do_not_specialize=_SIZES)
def rbf_gram_bwd_dq_kernel(
    grad_out,  # [B, H, L, M], last stride 1
    q,  # [B, L, H, D], last stride 1
    k,  # [B, M, H, D], last stride 1
    out,  # [B, H, L, M], contiguous
    dq,  # [B, L, H, D], contiguous
    heads, L, M, l_blocks, m_blocks, units, walk,
    grad_out_stride_b, grad_out_stride_h, grad_out_stride_l,
    q_stride_b, q_stride_l, q_stride_h,
    k_stride_b, k_stride_m, k_stride_h,
    gamma,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
    SCALED: tl.constexpr, INDEX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    DTYPE: tl.constexpr = q.dtype.element_ty
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        unit = first + step
        column = (unit % D_BLOCKS).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
        unit = unit // D_BLOCKS
        first_row = (unit % l_blocks).to(tl.int32) * BLOCK_L
        bh = (unit // l_blocks).to(tl.int64)
        b = bh // heads
        h = bh - b * heads
        q_head = q + b * q_stride_b + h * q_stride_h
        k_head = k + b * k_stride_b + h * k_stride_h
        grad_head = grad_out + b * grad_out_stride_b + h * grad_out_stride_h
        row = tl.arange(0, BLOCK_L)
        key = tl.arange(0, BLOCK_M)
        acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_L], tl.float32)
        scale = tl.full([BLOCK_L], 2.0**60, tl.float32)
        for m_block in range(0, _loop_bound(m_blocks)):
            first_key = m_block * BLOCK_M
            p = _products(
                grad_head + first_key, out + bh * L * M + first_key, first_row, row, L, grad_out_stride_l, key,
                M - first_key, M, INDEX)  # fmt: skip
            k_tile = _load_tile(k_head, first_key, key, M, k_stride_m, column, D, INDEX, UPCAST)
            acc, total, scale = _add_products(p, acc, total, scale, k_tile, True, SCALED, DTYPE)
        q_tile = _load_tile(q_head, first_row, row, L, q_stride_l, column, D, INDEX, False)
        result = _gradient(acc, total, scale, q_tile, gamma, SCALED)
        target = dq + ((b * L + first_row) * heads + h) * D + _offsets(row, heads * D, column, INDEX)
        tl.store(target, result.to(DTYPE), mask=(first_row + row < L)[:, None] & (column < D)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def rbf_gram_bwd_dk_kernel(
    grad_out,  # [B, H, L, M], last stride 1
    q,  # [B, L, H, D], last stride 1
    k,  # [B, M, H, D], last stride 1
    out,  # [B, H, L, M], contiguous
    partial_dk,  # [splits, B, M, H, D] float32, or dk [B, M, H, D] in any dtype where there is one split
    batch, heads, L, M, l_blocks, m_blocks, units, walk, split_blocks,
    grad_out_stride_b, grad_out_stride_h, grad_out_stride_l,
    q_stride_b, q_stride_l, q_stride_h,
    k_stride_b, k_stride_m, k_stride_h,
    gamma,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr,
    SCALED: tl.constexpr, INDEX: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    DTYPE: tl.constexpr = q.dtype.element_ty
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for step in range(0, _loop_bound(count)):
        unit = first + step
        column = (unit % D_BLOCKS).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
        unit = unit // D_BLOCKS
        first_key = (unit % m_blocks).to(tl.int32) * BLOCK_M
        unit = (unit // m_blocks).to(tl.int64)
        split = unit // (batch * heads)
        bh = unit - split * (batch * heads)
        b = bh // heads
        h = bh - b * heads
        q_head = q + b * q_stride_b + h * q_stride_h
        k_head = k + b * k_stride_b + h * k_stride_h
        grad_head = grad_out + b * grad_out_stride_b + h * grad_out_stride_h
        row = tl.arange(0, BLOCK_L)
        key = tl.arange(0, BLOCK_M)
        first_block = split.to(tl.int32) * split_blocks
        blocks = tl.minimum(l_blocks - first_block, split_blocks)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        scale = tl.full([BLOCK_M], 2.0**60, tl.float32)
        for block in range(0, _loop_bound(blocks)):
            first_row = (first_block + block) * BLOCK_L
            p = _products(
                grad_head + first_key, out + bh * L * M + first_key, first_row, row, L, grad_out_stride_l, key,
                M - first_key, M, INDEX)  # fmt: skip
            q_tile = _load_tile(q_head, first_row, row, L, q_stride_l, column, D, INDEX, UPCAST)
            acc, total, scale = _add_products(p, acc, total, scale, q_tile, False, SCALED, DTYPE)
        k_tile = _load_tile(k_head, first_key, key, M, k_stride_m, column, D, INDEX, False)
        result = _gradient(acc, total, scale, k_tile, gamma, SCALED)
        target = partial_dk + (((split * batch + b) * M + first_key) * heads + h) * D
        mask = (first_key + key < M)[:, None] & (column < D)[None, :]
        tl.store(target + _offsets(key, heads * D, column, INDEX), result.to(partial_dk.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------ launchers


class _Problem:
    """The sizes of a call, the arguments that all kernels share, and the block sizes."""

    def __init__(self, q, k, gamma):
        (self.B, self.L, self.H, self.D), self.M = q.shape, k.shape[1]
        self.element_size = q.element_size()
        limit = tuned(BLOCK, small=16)
        self.block_l, self.block_m = (max(16, min(limit, next_power_of_two(n))) for n in (self.L, self.M))
        self.l_blocks, self.m_blocks = cdiv(self.L, self.block_l), cdiv(self.M, self.block_m)
        self.shared = {
            "q": q, "k": k, "gamma": float(gamma), "D": self.D,
            "batch": self.B, "heads": self.H, "L": self.L, "M": self.M,
            "l_blocks": self.l_blocks, "m_blocks": self.m_blocks,
            "BLOCK_L": self.block_l, "BLOCK_M": self.block_m,
            "SCALED": q.dtype == torch.float16, "UPCAST": INTERPRETED,
        }  # fmt: skip
        self.add_strides("q", "blh", q)
        self.add_strides("k", "bmh", k)

    def add_strides(self, name, axes, tensor):
        for axis, stride in zip(axes, tensor.stride(), strict=False):
            self.shared[f"{name}_stride_{axis}"] = stride

    def launch(self, kernel, units, block_d, num_warps, num_stages, **extra):
        """A launch of `kernel` for so many pieces of work, with the shared arguments it names, and `extra`."""
        walk = cdiv(units, tuned(MAX_GRID, small=8))
        rows = [
            self.M,
            self.H * self.D,
            *(n for name, n in self.shared.items() if name.endswith(("stride_l", "stride_m"))),
        ]
        index = tl.int64 if max(units + walk, BLOCK * (max(rows) + 1)) > MAX_GRID else tl.int32
        available = {**self.shared, **extra, "units": units, "walk": walk, "INDEX": index, "BLOCK_D": block_d}
        args = {name: available[name] for name in kernel.arg_names}
        return Launch(kernel, cdiv(units, walk), args, num_warps, num_stages)


def _plan_forward(q, k, *, gamma=0.5):
    """(out, launches). Works on meta tensors."""
    p = _Problem(q, k, gamma)
    out = torch.empty((p.B, p.H, p.L, p.M), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out, []
    half = p.element_size == 2
    block_d = max(16, min(64 if half else 16, next_power_of_two(p.D)))
    units = p.B * p.H * p.l_blocks * p.m_blocks
    return out, [p.launch(rbf_gram_fwd_kernel, units, block_d, 4 if half else 8, 2, out=out)]


def _plan_backward(grad_out, q, k, out, *, gamma=0.5):
    """((dq, dk), launches). Works on meta tensors."""
    p = _Problem(q, k, gamma)
    dq, dk = (torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k))
    if out.numel() == 0:
        return (dq.zero_(), dk.zero_()), []
    p.shared.update(grad_out=grad_out, out=out)
    p.add_strides("grad_out", "bhl", grad_out)
    num_warps = 8
    block_d = max(16, min(64 if p.element_size == 2 else 32, next_power_of_two(p.D)))
    block_d = tuned(block_d, small=16)
    d_blocks = cdiv(p.D, block_d)
    launches = [p.launch(rbf_gram_bwd_dq_kernel, p.B * p.H * p.l_blocks * d_blocks, block_d, num_warps, 2, dq=dq)]

    units = p.B * p.H * p.m_blocks * d_blocks
    split_blocks = cdiv(p.l_blocks, min(MAX_SPLITS, tuned(cdiv(TARGET_PROGRAMS, units), small=cdiv(p.l_blocks, 2))))
    splits = cdiv(p.l_blocks, split_blocks)
    partial = dk if splits == 1 else torch.empty((splits, *dk.shape), dtype=torch.float32, device=q.device)
    launches.append(p.launch(
        rbf_gram_bwd_dk_kernel, units * splits, block_d, num_warps, 2, partial_dk=partial, split_blocks=split_blocks,
    ))  # fmt: skip
    if splits > 1:
        launches.append(sum_partials(partial, dk, splits))
    return (dq, dk), launches


def forward(q, k, *, gamma=0.5):
    """effvit::rbf_gram. The arguments must have been validated."""
    out, launches = _plan_forward(q, k, gamma=gamma)
    run(launches, q.device)
    return out


def backward(grad_out, q, k, out, *, gamma=0.5):
    """effvit::rbf_gram_backward: (dq, dk)."""
    results, launches = _plan_backward(grad_out, q, k, out, gamma=gamma)
    run(launches, q.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for name, shape in {"stage1-d32": (8, 3136, 49, 1, 32), "stage3-d64": (8, 196, 49, 5, 64),
                        "d256": (2, 1024, 256, 2, 256)}.items():  # fmt: skip
        B, L, M, H, D = shape
        for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float16, "fp16")):
            q, k = (torch.empty((B, n, H, D), dtype=dtype, device="meta") for n in (L, M))
            out, launches = _plan_forward(q, k)
            _, backward_launches = _plan_backward(out, q, k, out)
            for launch in launches + backward_launches:
                yield launch.aot(f"{name}-{short}")
