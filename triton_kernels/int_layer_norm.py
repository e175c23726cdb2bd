"""int_layer_norm in Triton: a program a row, read three times; short rows stay in the caches."""

import torch

from ._common import _loop_bound, tl, triton
from ._int_rows import LARGEST, OUT_DTYPES, SMALLEST, _between, _rounded_shift, ends, finish, launch_int_rows
from ._rows import _row_offsets

FURTHEST = tl.constexpr(46340)  # from the mean: its square is below 2^31


@triton.jit
def int_layer_norm_fwd_kernel(
    x,  # [..., C] int32, last stride 1
    bias, multiplier, shift,  # [C] int32, or None
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
    total = tl.sum(sums, axis=0)
    size = tl.abs(total)
    mean = size // C
    if not TRUNCATE:
        rest = 2 * (size - mean * C)
        mean += tl.where((rest > C) | ((rest == C) & ((mean & 1) == 1)), 1, 0)
    mean = tl.where(total < 0, -mean, mean)
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, _loop_bound(C), BLOCK):
        ok = start + column < C
        y = _between(tl.load(source + start + column, mask=ok, other=0).to(tl.int64) - mean, -FURTHEST, FURTHEST)
        sums += tl.where(ok, y * y, 0)
    v = tl.sum(sums, axis=0)
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
    f = LARGEST // k
    for start in range(0, _loop_bound(C), BLOCK):
        ok = start + column < C
        value = tl.load(source + start + column, mask=ok, other=0).to(tl.int64)
        y = _between(value - mean, -FURTHEST, FURTHEST) * f
        if TRUNCATE:
            y += tl.where(y < 0, 1, 0)
        y = y >> 1
        if bias is not None:
            y = _between(y + tl.load(bias + start + column, mask=ok, other=0).to(tl.int64), SMALLEST, LARGEST)
        if multiplier is not None:
            m = tl.load(multiplier + start + column, mask=ok, other=0).to(tl.int64)
            y = _rounded_shift(y * m, _between(tl.load(shift + start + column, mask=ok, other=1), 1, 61))
        tl.store(out + row * C + start + column, _between(y, LOW, HIGH).to(out.dtype.element_ty), mask=ok)


def _plan_forward(x, bias=None, multiplier=None, shift=None, *, exact=False, truncate=False, out_dtype=3):
    """(out, launches). Works on meta tensors."""
    low, high = ends(OUT_DTYPES[out_dtype])
    bias, multiplier, shift = (None if t is None else t.contiguous() for t in (bias, multiplier, shift))
    args = {"bias": bias, "multiplier": multiplier, "shift": shift}
    args |= {"EXACT": exact, "TRUNCATE": truncate, "LOW": low, "HIGH": high}
    return launch_int_rows(int_layer_norm_fwd_kernel, x, out_dtype, args)


def forward(x, bias=None, multiplier=None, shift=None, **options):
    """effvit::int_layer_norm. The arguments must have been validated."""
    return finish(_plan_forward(x, bias, multiplier, shift, **options), x.device)


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for C, rescales, exact, truncate in (
        (384, True, False, False),
        (96, False, True, False),
        (8000, True, False, True),
    ):
        x = torch.empty((8, 197, C), dtype=torch.int32, device="meta")
        vector = torch.empty(C, dtype=torch.int32, device="meta")
        vectors = (vector, vector, vector) if rescales else (vector, None, None)
        for launch in _plan_forward(x, *vectors, exact=exact, truncate=truncate, out_dtype=4 if rescales else 3)[1]:
            yield launch.aot(f"{C}-{'int8' if rescales else 'int32'}-{'exact' if exact else 'newton'}")
