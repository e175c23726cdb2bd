"""glu in Triton: forward and backward, elementwise over rows of any strides."""

import torch

from ._common import run, tl, triton
from ._rows import _exp, _load_rows, _tanh, launch_rows, rows_of

SIGMOID, GELU, SILU, RELU, TANH, NONE = (tl.constexpr(i) for i in range(6))  # NONE: of convolutions


@triton.jit
def _activation(b, ACT: tl.constexpr):
    """(act(b), its derivative)"""
    if ACT == NONE:
        return b, tl.full(b.shape, 1.0, tl.float32)
    if ACT == RELU:
        return tl.maximum(b, 0.0), tl.where(b > 0, 1.0, 0.0)
    if ACT == TANH:
        t = _tanh(b)
        return t, 1.0 - t * t
    if ACT == GELU:
        half = 0.5 + 0.5 * tl.erf(b * 0.7071067811865476)
        return b * half, half + b * 0.3989422804014327 * _exp(-0.5 * b * b)
    s = 1.0 / (1.0 + _exp(-b))
    if ACT == SILU:
        return b * s, s * (1.0 + b * (1.0 - s))
    return s, s * (1.0 - s)


@triton.jit
def glu_fwd_kernel(a, b, out, elements, C, a_rows, b_rows, ACT: tl.constexpr, BLOCK: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = e < elements
    x = _load_rows(a, a_rows, e, C, ok)
    y = _load_rows(b, b_rows, e, C, ok)
    act, _ = _activation(y, ACT)
    tl.store(out + e, (x * act).to(out.dtype.element_ty), mask=ok)


@triton.jit
def glu_bwd_kernel(
    grad, a, b, da, db, elements, C, gradient_stride, grad_rows, a_rows, b_rows, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = e < elements
    g = _load_rows(grad, grad_rows, e, C, ok)
    x = _load_rows(a, a_rows, e, C, ok)
    y = _load_rows(b, b_rows, e, C, ok)
    act, slope = _activation(y, ACT)
    at = e // C * gradient_stride + e % C
    tl.store(da + at, (g * act).to(da.dtype.element_ty), mask=ok)
    tl.store(db + at, (g * x * slope).to(db.dtype.element_ty), mask=ok)


def _halves(a, b):
    return (a, b) if b is not None else a.chunk(2, -1)


def _plan_forward(a, b=None, *, act=0):
    """(out, launches). Works on meta tensors."""
    x, y = _halves(a, b)
    out = torch.empty(x.shape, dtype=a.dtype, device=a.device)
    args = {"a": x, "b": y, "out": out, "a_rows": rows_of(x), "b_rows": rows_of(y), "ACT": act}
    return out, launch_rows(glu_fwd_kernel, x, args)


def _plan_backward(grad_out, a, b=None, *, act=0):
    """((da, db), launches). Works on meta tensors."""
    x, y = _halves(a, b)
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    db = torch.empty(0, dtype=a.dtype, device=a.device) if b is None else torch.empty_like(da)
    dx, dy = _halves(da, None if b is None else db)
    args = {
        "grad": grad_out, "a": x, "b": y, "da": dx, "db": dy, "gradient_stride": a.shape[-1],
        "grad_rows": rows_of(grad_out), "a_rows": rows_of(x), "b_rows": rows_of(y), "ACT": act,
    }  # fmt: skip
    return (da, db), launch_rows(glu_bwd_kernel, x, args)


def forward(a, b=None, *, act=0):
    """effvit::glu. The arguments must have been validated."""
    out, launches = _plan_forward(a, b, act=act)
    run(launches, a.device)
    return out


def backward(grad_out, a, b=None, *, act=0):
    """effvit::glu_backward: da, db."""
    grads, launches = _plan_backward(grad_out, a, b, act=act)
    run(launches, a.device)
    return grads


def aot_signatures():
    """Representative launches for tests/test_triton_aot.py: (name, kernel, signature, constexprs, attrs, options)."""
    for act in range(5):
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
            a = torch.empty((8, 56, 56, 340), dtype=dtype, device="meta")
            out, launches = _plan_forward(a, act=act)
            _, backward_launches = _plan_backward(out, a, act=act)
            for launch in launches + backward_launches:
                yield launch.aot(f"act{act}-{short}")
