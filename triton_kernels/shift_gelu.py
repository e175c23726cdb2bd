"""shift_gelu in Triton: a program a row, read twice; short rows stay in the caches."""

import torch

from ._common import _loop_bound, tl, triton
from ._int_rows import (
    LARGEST,
    OUT_DTYPES,
    SMALLEST,
    _between,
    _load_or,
    _rounded_shift,
    _shift_exp,
    _shift_exp_above,
    ends,
    finish,
    launch_int_rows,
)
from ._rows import _row_offsets


@triton.jit(do_not_specialize=["X", "n", "multiplier", "shift"])
def shift_gelu_fwd_kernel(
    x,  # [..., C] of any integers, last stride 1
    out,  # [..., C], contiguous
    C, X, n, multiplier, shift, x_rows,
    SHIFT: tl.constexpr, HALF_BIT: tl.constexpr, SAFE: tl.constexpr, RESCALES: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = x + _row_offsets(row, x_rows)
    column = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], SMALLEST, tl.int32)
    for start in range(0, _loop_bound(C), BLOCK):
        top = tl.maximum(top, _load_or(source + start + column, start + column < C, SMALLEST))
    highest = tl.max(top, axis=0).to(tl.int64)
    if SAFE:
        highest = tl.maximum(highest, 0)
        of_top = _shift_exp(highest, X, n, HALF_BIT).to(tl.int64)
    else:
        of_top = tl.where(
            highest < 0,
            _shift_exp_above(-highest, X, n, HALF_BIT),
            _shift_exp(tl.maximum(highest, 0), X, n, HALF_BIT).to(tl.int64),
        )
    for start in range(0, _loop_bound(C), BLOCK):
        ok = start + column < C
        value = _load_or(source + start + column, ok, SMALLEST)
        e = _shift_exp(highest - value.to(tl.int64), X, n, HALF_BIT)
        f = LARGEST // tl.minimum(e.to(tl.int64) + of_top, LARGEST).to(tl.int32)
        y = value.to(tl.int64) * ((e * f) >> SHIFT).to(tl.int64)
        if RESCALES:
            y = _rounded_shift(_between(y, SMALLEST, LARGEST) * multiplier, shift)
        tl.store(out + row * C + start + column, _between(y, LOW, HIGH).to(out.dtype.element_ty), mask=ok)


def _plan_forward(
    x, *, x0, n=23, bits=8, half_bit=True, safe_max=True, multiplier=0, shift=31, out_dtype=3
):  # fmt: skip
    """(out, launches). Works on meta tensors."""
    low, high = ends(OUT_DTYPES[out_dtype])
    args = {
        "X": -x0, "n": n, "multiplier": multiplier, "shift": shift, "SHIFT": 32 - bits, "HALF_BIT": half_bit,
        "SAFE": safe_max, "RESCALES": multiplier != 0, "LOW": low, "HIGH": high,
    }  # fmt: skip
    return launch_int_rows(shift_gelu_fwd_kernel, x, out_dtype, args)


def forward(x, **options):
    """effvit::shift_gelu. The arguments must have been validated."""
    return finish(_plan_forward(x, **options), x.device)


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for C, half_bit, safe_max, multiplier, out_dtype, dtype in (
        (1536, True, True, 2**30, 4, "int8"), (384, False, False, 0, 3, "int32"), (8000, True, True, 2**30, 6, "int16"),
    ):  # fmt: skip
        x = torch.empty((8, 197, C), dtype=getattr(torch, dtype), device="meta")
        call = {"x0": -12, "half_bit": half_bit, "safe_max": safe_max, "multiplier": multiplier}
        for launch in _plan_forward(x, **call, out_dtype=out_dtype)[1]:
            yield launch.aot(f"{C}-{dtype}-{'rescaled' if multiplier else 'int32'}" + "-deployed" * (not half_bit))
