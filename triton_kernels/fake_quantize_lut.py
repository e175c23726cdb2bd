"""fake_quantize_lut in Triton: quantize_lut's search and the value of what it finds."""

import torch

from ._common import run, tl, triton
from ._rows import launch_rows, rows_of
from .quantize_lut import _count, _load_exactly, code_bits


@triton.jit(do_not_specialize=["T"])
def fake_quantize_lut_fwd_kernel(
    x,  # [..., C], last stride 1
    thresholds,  # [T] float32, ascending
    values,  # [T + 1] float32
    out,  # [..., C], contiguous
    elements, C, T, x_rows, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = e < elements
    given = _load_exactly(x, x_rows, e, C, ok)
    y = tl.load(values + _count(given, thresholds, T, BITS))
    tl.store(out + e, tl.where(given == given, y, given).to(out.dtype.element_ty), mask=ok)


def _plan_forward(x, thresholds, values):
    """(out, launches). Works on meta tensors."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    args = {
        "x": x, "thresholds": thresholds.contiguous(), "values": values.contiguous(), "out": out,
        "T": thresholds.shape[0], "x_rows": rows_of(x), "BITS": code_bits(thresholds),
    }  # fmt: skip
    return out, launch_rows(fake_quantize_lut_fwd_kernel, x, args)


def forward(x, thresholds, values):
    """effvit::fake_quantize_lut. The arguments must have been validated."""
    out, launches = _plan_forward(x, thresholds, values)
    run(launches, x.device)
    return out


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for count in (15, 16, 255):
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            x = torch.empty((8, 6, 197, 197), dtype=dtype, device="meta")
            tables = (torch.empty(n, device="meta") for n in (count, count + 1))
            for launch in _plan_forward(x, *tables)[1]:
                yield launch.aot(f"{count}-{short}")
