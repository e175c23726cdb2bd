"""shiftmax in Triton: a program a row, read three times; short rows stay in the caches."""

import torch

from ._common import _loop_bound, tl, triton
from ._int_rows import LARGEST, SMALLEST, _load_or, _shift_exp, finish, launch_int_rows
from ._rows import _row_offsets


@triton.jit(do_not_specialize=["X", "n"])
def shiftmax_fwd_kernel(
    x,  # [..., C] of any integers, last stride 1
    out,  # [..., C], contiguous
    C, X, n, x_rows,
    SHIFT: tl.constexpr, HALF_BIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = x + _row_offsets(row, x_rows)
    column = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], SMALLEST, tl.int32)
    for start in range(0, _loop_bound(C), BLOCK):
        top = tl.maximum(top, _load_or(source + start + column, start + column < C, SMALLEST))
    highest = tl.max(top, axis=0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, _loop_bound(C), BLOCK):
        ok = start + column < C
        e = _shift_exp(highest - _load_or(source + start + column, ok, 0).to(tl.int64), X, n, HALF_BIT)
        total += tl.where(ok, e, 0).to(tl.int64)
    f = LARGEST // tl.minimum(tl.sum(total, axis=0), LARGEST).to(tl.int32)
    for start in range(0, _loop_bound(C), BLOCK):
        ok = start + column < C
        e = _shift_exp(highest - _load_or(source + start + column, ok, SMALLEST).to(tl.int64), X, n, HALF_BIT)
        y = (e * f) >> SHIFT  # at most 2^31 - 1, where there are columns
        tl.store(out + row * C + start + column, y.to(out.dtype.element_ty), mask=ok)


def _plan_forward(x, *, x0, n=15, bits=8, half_bit=True, out_dtype=4):
    """(out, launches). Works on meta tensors."""
    args = {"X": -x0, "n": n, "SHIFT": 32 - bits, "HALF_BIT": half_bit}
    return launch_int_rows(shiftmax_fwd_kernel, x, out_dtype, args)


def forward(x, **options):
    """effvit::shiftmax. The arguments must have been validated."""
    return finish(_plan_forward(x, **options), x.device)


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for C, half_bit, bits, out_dtype, dtype in (
        (197, True, 8, 4, "int8"), (49, False, 8, 4, "int32"), (8000, True, 16, 6, "int32"), (64, True, 16, 3, "int16"),
    ):  # fmt: skip
        x = torch.empty((8, 6, 197, C), dtype=getattr(torch, dtype), device="meta")
        call = {"x0": -20, "bits": bits, "half_bit": half_bit, "out_dtype": out_dtype}
        for launch in _plan_forward(x, **call)[1]:
            yield launch.aot(f"{C}-{dtype}-bits{bits}" + "-deployed" * (not half_bit))
