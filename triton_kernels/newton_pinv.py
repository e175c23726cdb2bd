"""Newton-Schulz inverses of small matrices in Triton: forward, and the gradient in closed form.

Matrices of up to MAX_FUSED_SIZE rows: one program takes a matrix through all steps, with V and P in registers, in
float32. Larger ones: a step is two launches of a blocked batched product over float32 copies in memory, T = V P and
V = 2V - T V. One program could do all steps there too if its stores were visible to all of its threads at the next
step, but Triton does not promise that.

The gradient is da = -V^T G V^T, two launches of the same product.
"""

import torch

from ._common import (
    MAX_GRID,
    Launch,
    _loop_bound,
    cdiv,
    device_function,
    next_power_of_two,
    run,
    tl,
    triton,
    tuned,
)
from ._tiles import _share_of

MAX_FUSED_SIZE = 64
BLOCK = 64  # rows and columns of a block of a large product

# Sizes that change from call to call; specialising on their values would only recompile.
_SIZES = ["heads", "m", "matrices", "units", "walk", "iterations"]


@device_function
def _load_block(pointer, row, column, m, stride_row, stride_column):
    """A block of a matrix as float32; zeros beyond m."""
    offset = row[:, None] * stride_row + column[None, :] * stride_column
    return tl.load(pointer + offset, mask=(row < m)[:, None] & (column < m)[None, :], other=0.0).to(tl.float32)


@device_function
def _is_nan(x):
    return (x != x).to(tl.int32)


@device_function
def _initial_scale(largest, has_nan, step):
    """step / largest^2; NaN where a row sum is NaN, as in PyTorch: tl.max passes it over."""
    return tl.where(has_nan, float("nan"), step / (largest * largest))


@triton.jit(do_not_specialize=_SIZES)
def newton_pinv_fwd_kernel(
    a,  # [B, H, m, m], last stride 1
    out,  # [B, H, m, m], contiguous
    heads, m, units, walk, iterations,
    a_stride_b, a_stride_h, a_stride_i,
    ridge, step,
    BLOCK_M: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """All steps of matrices that fit in one block."""
    index = tl.arange(0, BLOCK_M)
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for i in range(0, _loop_bound(count)):
        unit = (first + i).to(tl.int64)
        b = unit // heads
        p = _load_block(a + b * a_stride_b + (unit - b * heads) * a_stride_h, index, index, m, a_stride_i, 1)
        sums = tl.sum(p, axis=1)
        nans = tl.max(_is_nan(sums), axis=0)
        alpha = _initial_scale(tl.max(tl.where(index < m, sums, float("-inf")), axis=0), nans > 0, step)
        p += tl.where((index[:, None] == index[None, :]) & (index < m)[:, None], ridge, 0.0)
        v = p * alpha
        for j in range(0, _loop_bound(iterations)):
            # P never changes here. Without this the compiler would lay it out as an operand ahead of the loop, and keep
            # that in registers that there are not.
            t = tl.dot(v, tl.where(j >= 0, p, 0.0), input_precision="ieee")
            v = 2.0 * v - tl.dot(t, v, input_precision="ieee")
        offset = unit * m * m + index[:, None] * m + index[None, :]
        tl.store(out + offset, v.to(out.dtype.element_ty), mask=(index < m)[:, None] & (index < m)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def newton_pinv_start_kernel(
    a,  # [B, H, m, m], last stride 1
    p,  # [B, H, m, m] float32, contiguous
    v,  # [B, H, m, m] float32, contiguous
    heads, m, units, walk,
    a_stride_b, a_stride_h, a_stride_i,
    ridge, step,
    BLOCK_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """P = a + ridge I and V = alpha P of large matrices."""
    column = tl.arange(0, BLOCK_M)
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for i in range(0, _loop_bound(count)):
        unit = (first + i).to(tl.int64)
        b = unit // heads
        source = a + b * a_stride_b + (unit - b * heads) * a_stride_h
        largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        nans = tl.zeros([BLOCK_ROWS], tl.int32)
        for start in range(0, _loop_bound(m), BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            sums = tl.sum(_load_block(source, row, column, m, a_stride_i, 1), axis=1)
            largest = tl.maximum(largest, tl.where(row < m, sums, float("-inf")))
            nans += _is_nan(sums)
        alpha = _initial_scale(tl.max(largest, axis=0), tl.max(nans, axis=0) > 0, step)
        for start in range(0, _loop_bound(m), BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            x = _load_block(source, row, column, m, a_stride_i, 1)
            x += tl.where(row[:, None] == column[None, :], ridge, 0.0)
            offset = unit * m * m + row[:, None] * m + column[None, :]
            mask = (row < m)[:, None] & (column < m)[None, :]
            tl.store(p + offset, x, mask=mask)
            tl.store(v + offset, x * alpha, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def newton_pinv_product_kernel(
    left,  # [B, H, m, m], any strides
    right,  # [B, H, m, m], any strides
    addend,  # [B, H, m, m] float32, contiguous, or None
    product,  # [B, H, m, m], contiguous
    heads, m, units, walk,
    left_stride_b, left_stride_h, left_stride_i, left_stride_j,
    right_stride_b, right_stride_h, right_stride_i, right_stride_j,
    factor,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """product = 2 addend + factor * left right, accumulated in float32."""
    blocks = (m + BLOCK_M - 1) // BLOCK_M
    first, count = _share_of(units, walk, tl.program_id(0), INDEX)
    for i in range(0, _loop_bound(count)):
        unit = first + i
        column = (unit % blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
        unit = unit // blocks
        row = (unit % blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
        matrix = (unit // blocks).to(tl.int64)
        b = matrix // heads
        h = matrix - b * heads
        acc = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
        for start in range(0, _loop_bound(m), BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = _load_block(left + b * left_stride_b + h * left_stride_h, row, k, m, left_stride_i, left_stride_j)
            y = _load_block(right + b * right_stride_b + h * right_stride_h, k, column, m, right_stride_i,
                            right_stride_j)  # fmt: skip
            acc = tl.dot(x, y, acc, input_precision="ieee")
        acc = acc * factor
        if addend is not None:
            acc += 2.0 * _load_block(addend + matrix * m * m, row, column, m, m, 1)
        offset = matrix * m * m + row[:, None] * m + column[None, :]
        mask = (row < m)[:, None] & (column < m)[None, :]
        tl.store(product + offset, acc.to(product.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------ launchers


def _launch(kernel, units, args, num_warps, num_stages=1):
    walk = cdiv(units, tuned(MAX_GRID, small=4))
    index = tl.int64 if units + walk > MAX_GRID else tl.int32
    args = {**args, "units": units, "walk": walk, "INDEX": index}
    return Launch(kernel, cdiv(units, walk), {n: args[n] for n in kernel.arg_names}, num_warps, num_stages)


def _fused_warps(block):
    """What ahead-of-time compilation shows to be free of spills: 64 x 64 products on the FMA units take many registers.
    A warp of AMD has twice the lanes, and half the registers where there are 16 of them."""
    return {16: 1, 32: 4, 64: 16 if torch.version.hip is None else 8}[block]


def _strides(name, axes, tensor):
    return {f"{name}_stride_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=False)}


def _product(left, right, product, *, factor=1.0, addend=None):
    B, H, m, _ = product.shape
    block = tuned(BLOCK, small=16)
    args = {
        "left": left, "right": right, "addend": addend, "product": product, "heads": H, "m": m,
        "factor": factor, "BLOCK_M": block, "BLOCK_K": 16,
        **_strides("left", "bhij", left), **_strides("right", "bhij", right),
    }  # fmt: skip
    return _launch(newton_pinv_product_kernel, B * H * cdiv(m, block) ** 2, args, num_warps=8, num_stages=1)


def _plan_forward(a, *, iterations=20, ridge=0.01, step=1.8):
    """(out, launches). Works on meta tensors."""
    B, H, m, _ = a.shape
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out, []
    args = {"a": a, "heads": H, "m": m, "ridge": float(ridge), "step": float(step), **_strides("a", "bhi", a)}
    if m <= tuned(MAX_FUSED_SIZE, small=16):
        block = max(16, next_power_of_two(m))
        args.update(out=out, iterations=iterations, BLOCK_M=block)
        return out, [_launch(newton_pinv_fwd_kernel, B * H, args, _fused_warps(block))]
    p, v, t, other = (torch.empty(a.shape, dtype=torch.float32, device=a.device) for _ in range(4))
    if iterations == 0:
        v = out
    blocks = {"BLOCK_ROWS": 16, "BLOCK_M": next_power_of_two(m)}
    launches = [_launch(newton_pinv_start_kernel, B * H, {**args, "p": p, "v": v, **blocks}, num_warps=8)]
    for i in range(iterations):
        target = out if i == iterations - 1 else other
        launches += [_product(v, p, t), _product(t, v, target, factor=-1.0, addend=v)]
        v, other = target, v
    return out, launches


def _plan_backward(grad_out, out):
    """(da, launches). Works on meta tensors."""
    B, H, m, _ = out.shape
    da = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    if out.numel() == 0:
        return da, []
    t = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    return da, [_product(out.mT, grad_out, t), _product(t, out.mT, da, factor=-1.0)]


def forward(a, *, iterations=20, ridge=0.01, step=1.8):
    """effvit::newton_pinv. The arguments must have been validated."""
    out, launches = _plan_forward(a, iterations=iterations, ridge=ridge, step=step)
    run(launches, a.device)
    return out


def backward(grad_out, out):
    """effvit::newton_pinv_backward: da."""
    da, launches = _plan_backward(grad_out, out)
    run(launches, out.device)
    return da


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for m in (24, 49, 144, 9):
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            a = torch.empty((8, 5, m, m), dtype=dtype, device="meta")
            out, launches = _plan_forward(a, iterations=2)
            _, backward_launches = _plan_backward(out, out)
            for launch in launches + backward_launches:
                yield launch.aot(f"m{m}-{short}")
