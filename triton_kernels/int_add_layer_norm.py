"""int_add_layer_norm in Triton: a program a row; the sum is made anew in each of three passes over the row's caches."""

import torch

from ._common import _loop_bound, device_function, tl, triton
from ._int_rows import (
    FURTHEST,
    OUT_DTYPES,
    _between,
    _mean,
    _normalized,
    _reciprocal_root,
    _rescaled,
    ends,
    finish,
    launch_int_rows,
)
from ._rows import _row_offsets, rows_of


@device_function
def _sum(x, residual, xm, xc, rm, rc, at, ok, LEAST: tl.constexpr, MOST: tl.constexpr):
    return _between(
        _rescaled(x + at, xm + at, xc + at, ok) + _rescaled(residual + at, rm + at, rc + at, ok), LEAST, MOST
    )


@triton.jit
def int_add_layer_norm_fwd_kernel(
    x, residual,  # [..., C] of any integers, last stride 1
    x_multiplier, x_shift, residual_multiplier, residual_shift,  # [C] int32
    bias, multiplier, shift, offset,  # [C] int32, or None
    out, total,  # [..., C], contiguous
    C, x_rows, residual_rows,
    EXACT: tl.constexpr, TRUNCATE: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    a, b = x + _row_offsets(row, x_rows), residual + _row_offsets(row, residual_rows)
    column = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, _loop_bound(C), BLOCK):
        at = start + column
        z = _sum(a, b, x_multiplier, x_shift, residual_multiplier, residual_shift, at, at < C, LEAST, MOST)
        tl.store(total + row * C + at, z.to(tl.int16), mask=at < C)
        sums += z  # 0 beyond the row
    mean = _mean(tl.sum(sums, axis=0), C, TRUNCATE)
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, _loop_bound(C), BLOCK):
        at = start + column
        z = _sum(a, b, x_multiplier, x_shift, residual_multiplier, residual_shift, at, at < C, LEAST, MOST)
        y = _between(z - mean, -FURTHEST, FURTHEST)
        sums += tl.where(at < C, y * y, 0)
    f = _reciprocal_root(tl.sum(sums, axis=0), EXACT)
    for start in range(0, _loop_bound(C), BLOCK):
        at = start + column
        z = _sum(a, b, x_multiplier, x_shift, residual_multiplier, residual_shift, at, at < C, LEAST, MOST)
        y = _normalized(z - mean, f, bias, multiplier, shift, offset, at, at < C, TRUNCATE)
        tl.store(out + row * C + at, _between(y, LOW, HIGH).to(out.dtype.element_ty), mask=at < C)


def _plan_forward(
    x, residual, x_multiplier, x_shift, residual_multiplier, residual_shift, bias=None, multiplier=None, shift=None,
    offset=None, *, exact=False, truncate=False, bits=16, out_dtype=3,
):  # fmt: skip
    """((out, sum), launches). Works on meta tensors."""
    low, high = ends(OUT_DTYPES[out_dtype])
    least, most = ends(torch.int16, bits)
    args = {
        "x_multiplier": x_multiplier, "x_shift": x_shift, "residual_multiplier": residual_multiplier,
        "residual_shift": residual_shift, "bias": bias, "multiplier": multiplier, "shift": shift, "offset": offset,
    }  # fmt: skip
    args = {name: None if t is None else t.contiguous() for name, t in args.items()}
    total = torch.empty(x.shape, dtype=torch.int16, device=x.device)
    args |= {"residual": residual, "residual_rows": rows_of(residual), "total": total}
    args |= {"EXACT": exact, "TRUNCATE": truncate, "LEAST": least, "MOST": most, "LOW": low, "HIGH": high}
    out, launches = launch_int_rows(int_add_layer_norm_fwd_kernel, x, out_dtype, args)
    return (out, total), launches


def forward(x, residual, *vectors, **options):
    """effvit::int_add_layer_norm. The arguments must have been validated."""
    return finish(_plan_forward(x, residual, *vectors, **options), x.device)


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for C, dtype, out_dtype, exact in ((384, "int8", 4, False), (96, "int32", 3, True), (8000, "int16", 6, False)):
        x, residual = (torch.empty((8, 197, C), dtype=getattr(torch, t), device="meta") for t in (dtype, "int16"))
        vector = torch.empty(C, dtype=torch.int32, device="meta")
        vectors = (vector,) * 8
        for launch in _plan_forward(x, residual, *vectors, exact=exact, out_dtype=out_dtype)[1]:
            yield launch.aot(f"{C}-{dtype}-{out_dtype}")
