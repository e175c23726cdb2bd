"""requantize in Triton: a program a row."""

import torch

from ._common import _loop_bound, tl, triton
from ._int_rows import OUT_DTYPES, _between, _rescaled, ends, finish, launch_int_rows
from ._rows import _row_offsets, rows_of


@triton.jit
def requantize_fwd_kernel(
    x,  # [..., C] of any integers, last stride 1
    multiplier, shift,  # [C] int32
    residual,  # [..., C] of any integers, last stride 1, or None
    residual_multiplier, residual_shift,  # [C] int32, or None
    out,  # [..., C], contiguous
    C, x_rows, residual_rows,
    LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = x + _row_offsets(row, x_rows)
    column = tl.arange(0, BLOCK)
    for start in range(0, _loop_bound(C), BLOCK):
        ok = start + column < C
        y = _rescaled(source + start + column, multiplier + start + column, shift + start + column, ok)
        if residual is not None:
            other, at = residual + _row_offsets(row, residual_rows), start + column
            y += _rescaled(other + at, residual_multiplier + at, residual_shift + at, ok)
        tl.store(out + row * C + start + column, _between(y, LOW, HIGH).to(out.dtype.element_ty), mask=ok)


def _plan_forward(
    x, multiplier, shift, residual=None, residual_multiplier=None, residual_shift=None, *, bits=8, out_dtype=4
):
    """(out, launches). Works on meta tensors."""
    low, high = ends(OUT_DTYPES[out_dtype], bits)
    vectors = {
        "multiplier": multiplier, "shift": shift, "residual_multiplier": residual_multiplier,
        "residual_shift": residual_shift,
    }  # fmt: skip
    args = {name: None if t is None else t.contiguous() for name, t in vectors.items()}
    args |= {"residual": residual, "residual_rows": None if residual is None else rows_of(residual)}
    return launch_int_rows(requantize_fwd_kernel, x, out_dtype, {**args, "LOW": low, "HIGH": high})


def forward(x, multiplier, shift, residual=None, residual_multiplier=None, residual_shift=None, **options):
    """effvit::requantize. The arguments must have been validated."""
    planned = _plan_forward(x, multiplier, shift, residual, residual_multiplier, residual_shift, **options)
    return finish(planned, x.device)


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for C, with_residual, out_dtype, dtype in (
        (384, False, 4, "int32"),
        (96, True, 6, "int8"),
        (8000, True, 3, "int32"),
    ):
        x, residual = (torch.empty((8, 197, C), dtype=getattr(torch, t), device="meta") for t in (dtype, "int16"))
        vector = torch.empty(C, dtype=torch.int32, device="meta")
        more = (residual, vector, vector) if with_residual else ()
        for launch in _plan_forward(x, vector, vector, *more, bits=16, out_dtype=out_dtype)[1]:
            yield launch.aot(f"{C}-{dtype}{'-residual' * with_residual}-{out_dtype}")
