"""quantize_int8 in Triton: the largest |x| of every row and its values in steps of that, in one pass.

A program takes a block of rows. Rows longer than MAX_COLUMNS are read twice, block by block. Divisions are IEEE ones
and everything is float32, so that the bits are those of every other device.
"""

import torch

from ._common import SCALE, Launch, _loop_bound, cdiv, device_function, next_power_of_two, run, tl, triton, tuned
from ._int8_epilogue import _round_half_even, _saturated
from ._rows import _row_offsets, rows_of

ELEMENTS = 2048  # of a program
MAX_COLUMNS = 4096


@device_function
def _load_block(x, offset, row_ok, column, K, excluded):
    """Columns `column` of rows at `offset` in float32; 0 where there are none or they are excluded."""
    ok = row_ok[:, None] & (column < K)[None, :]
    if excluded is not None:
        ok = ok & (tl.load(excluded + column, mask=column < K, other=1) == 0)[None, :]
    return tl.load(x + offset[:, None] + column[None, :], mask=ok, other=0.0).to(tl.float32)


@device_function
def _largest(block):
    """The largest |x| of each row, as bits: they are ordered like the numbers, and a NaN is above them all."""
    return tl.max(block.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@device_function
def _scale_of(largest):
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0)
    return tl.where(scale == 0.0, 1.0, scale)


@device_function
def _quantized(block, scale, AWAY: tl.constexpr):
    y = _saturated(tl.div_rn(block, scale[:, None]), -127.0)
    if AWAY:  # of ties; y + 1/2 would be rounded itself, below 1/2 to 1
        size = tl.abs(y)
        whole = tl.floor(size)
        whole += tl.where(size - whole >= 0.5, 1.0, 0.0)
        y = tl.where(y < 0.0, -whole, whole)
    else:
        y = _round_half_even(y)
    return y.to(tl.int8)


@triton.jit(do_not_specialize=["rows"])
def quantize_int8_fwd_kernel(
    x,  # [..., K], last stride 1
    scale,  # [...] float32, any strides, or None
    excluded,  # [K] int8, or None
    q,  # [..., K] int8, contiguous
    out_scale,  # [...] float32, contiguous
    rows, K, x_rows, scale_rows,
    AWAY: tl.constexpr, ONE_PASS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)
    ok = row < rows
    offset = _row_offsets(row, x_rows)
    column = tl.arange(0, BLOCK_K)
    target = q + first * K + tl.arange(0, BLOCK_ROWS)[:, None] * K + column[None, :]
    if scale is not None:
        step = tl.load(scale + _row_offsets(row, scale_rows), mask=ok, other=1.0)
    if ONE_PASS:
        block = _load_block(x, offset, ok, column, K, excluded)
        if scale is None:
            step = _scale_of(_largest(block))
        tl.store(target, _quantized(block, step, AWAY), mask=ok[:, None] & (column < K)[None, :])
    else:
        if scale is None:
            largest = tl.zeros([BLOCK_ROWS], tl.int32)
            for start in range(0, _loop_bound(K), BLOCK_K):
                largest = tl.maximum(largest, _largest(_load_block(x, offset, ok, start + column, K, excluded)))
            step = _scale_of(largest)
        for start in range(0, _loop_bound(K), BLOCK_K):
            block = _load_block(x, offset, ok, start + column, K, excluded)
            tl.store(target + start, _quantized(block, step, AWAY), mask=ok[:, None] & (start + column < K)[None, :])
    tl.store(out_scale + row, step, mask=ok)


def _plan_forward(x, scale=None, excluded=None, *, round=0):
    """((q, out_scale), launches). Works on meta tensors."""
    lead, K = x.shape[:-1], x.shape[-1]
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    out_scale = torch.empty(lead, dtype=torch.float32, device=x.device)
    rows = out_scale.numel()
    if rows == 0:
        return (q, out_scale), []
    excluded = None if excluded is None else excluded.contiguous()  # it may be expanded
    block_k = min(next_power_of_two(max(K, 16)), tuned(MAX_COLUMNS, small=16))
    block_rows = min(next_power_of_two(rows), tuned(max(ELEMENTS * SCALE // block_k, 1), small=2))
    args = {
        "x": x, "scale": scale, "excluded": excluded, "q": q, "out_scale": out_scale, "rows": rows, "K": K,
        "x_rows": rows_of(x), "scale_rows": None if scale is None else rows_of(scale[..., None]),
        "AWAY": round == 1, "ONE_PASS": block_k >= K, "BLOCK_ROWS": block_rows, "BLOCK_K": block_k,
    }  # fmt: skip
    return (q, out_scale), [Launch(quantize_int8_fwd_kernel, cdiv(rows, block_rows), args, num_warps=4, num_stages=1)]


def forward(x, scale=None, excluded=None, *, round=0):
    """effvit::quantize_int8. The arguments must have been validated."""
    results, launches = _plan_forward(x, scale, excluded, round=round)
    run(launches, x.device)
    return results


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for K, tensors, round in ((384, "token", 0), (384, "given", 1), (8000, "outliers", 0), (33, "token", 1)):
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            x = torch.empty((64, 197, K), dtype=dtype, device="meta")
            scale = torch.empty((64, 197), device="meta") if tensors == "given" else None
            excluded = torch.empty(K, dtype=torch.int8, device="meta") if tensors == "outliers" else None
            for launch in _plan_forward(x, scale, excluded, round=round)[1]:
                yield launch.aot(f"{K}-{tensors}-{('even', 'away')[round]}-{short}")
