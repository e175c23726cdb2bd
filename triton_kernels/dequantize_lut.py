"""dequantize_lut in Triton: a look-up, elementwise over rows of any strides."""

import torch

from ._common import run, tl, triton
from ._rows import _row_offsets, launch_rows, rows_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # as the option counts them


@triton.jit(do_not_specialize=["V"])
def dequantize_lut_fwd_kernel(
    q,  # [..., C] uint8, last stride 1
    values,  # [V] float32
    out,  # [..., C], contiguous
    elements, C, V, q_rows, BLOCK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = e < elements
    code = tl.load(q + _row_offsets(e // C, q_rows) + e % C, mask=ok, other=0).to(tl.int32)
    y = tl.load(values + code, mask=code < V, other=float("nan"))
    tl.store(out + e, y.to(out.dtype.element_ty), mask=ok)


def _plan_forward(q, values, *, out_dtype=0):
    """(out, launches). Works on meta tensors."""
    out = torch.empty(q.shape, dtype=DTYPES[out_dtype], device=q.device)
    args = {"q": q, "values": values.contiguous(), "out": out, "V": values.shape[0], "q_rows": rows_of(q)}
    return out, launch_rows(dequantize_lut_fwd_kernel, q, args)


def forward(q, values, *, out_dtype=0):
    """effvit::dequantize_lut. The arguments must have been validated."""
    out, launches = _plan_forward(q, values, out_dtype=out_dtype)
    run(launches, q.device)
    return out


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    q = torch.empty((8, 6, 197, 197), dtype=torch.uint8, device="meta")
    for i, short in enumerate(("fp32", "bf16", "fp16")):
        for launch in _plan_forward(q, torch.empty(16, device="meta"), out_dtype=i)[1]:
            yield launch.aot(short)
