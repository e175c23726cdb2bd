"""int_layer_norm in Triton: a program a row, read three times; short rows stay in the caches."""

import torch

from ._common import _loop_bound, tl, triton
from ._int_rows import (
    FURTHEST,
    OUT_DTYPES,
    _between,
    _mean,
    _normalized,
    _reciprocal_root,
    ends,
    finish,
    launch_int_rows,
)
from ._rows import _row_offsets


@triton.jit
def int_layer_norm_fwd_kernel(
    x,  # [..., C] of any integers, last stride 1
    bias, multiplier, shift, offset,  # [C] int32, or None
    out,  # [..., C], contiguous
    C, x_rows,
    EXACT: tl.constexpr, TRUNCATE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = x + _row_offsets(row, x_rows)
    column = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, _loop_bound(C), BLOCK):
        sums += tl.load(source + start + column, mask=start + column < C, other=0).to(tl.int64)
    mean = _mean(tl.sum(sums, axis=0), C, TRUNCATE)
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, _loop_bound(C), BLOCK):
        ok = start + column < C
        y = _between(tl.load(source + start + column, mask=ok, other=0).to(tl.int64) - mean, -FURTHEST, FURTHEST)
        sums += tl.where(ok, y * y, 0)
    f = _reciprocal_root(tl.sum(sums, axis=0), EXACT)
    for start in range(0, _loop_bound(C), BLOCK):
        ok = start + column < C
        y = tl.load(source + start + column, mask=ok, other=0).to(tl.int64) - mean
        y = _normalized(y, f, bias, multiplier, shift, offset, start + column, ok, TRUNCATE)
        tl.store(out + row * C + start + column, _between(y, LOW, HIGH).to(out.dtype.element_ty), mask=ok)


def _plan_forward(x, bias=None, multiplier=None, shift=None, offset=None, *, exact=False, truncate=False, out_dtype=3):
    """(out, launches). Works on meta tensors."""
    low, high = ends(OUT_DTYPES[out_dtype])
    args = {"bias": bias, "multiplier": multiplier, "shift": shift, "offset": offset}
    args = {name: None if t is None else t.contiguous() for name, t in args.items()}
    args |= {"EXACT": exact, "TRUNCATE": truncate, "LOW": low, "HIGH": high}
    return launch_int_rows(int_layer_norm_fwd_kernel, x, out_dtype, args)


def forward(x, bias=None, multiplier=None, shift=None, offset=None, **options):
    """effvit::int_layer_norm. The arguments must have been validated."""
    return finish(_plan_forward(x, bias, multiplier, shift, offset, **options), x.device)


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for C, rescales, exact, truncate, dtype in (
        (384, True, False, False, "int16"), (96, False, True, False, "int32"), (8000, True, False, True, "int32"),
    ):  # fmt: skip
        x = torch.empty((8, 197, C), dtype=getattr(torch, dtype), device="meta")
        vector = torch.empty(C, dtype=torch.int32, device="meta")
        vectors = (vector, vector, vector, vector) if rescales else (vector,)
        for launch in _plan_forward(x, *vectors, exact=exact, truncate=truncate, out_dtype=4 if rescales else 3)[1]:
            yield launch.aot(f"{C}-{dtype}-{'int8' if rescales else 'int32'}-{'exact' if exact else 'newton'}")
