"""What follows the exact sums of an int8 product, in registers: scales, bias, residual, activation, rounding."""

from typing import Any, NamedTuple

import torch

from ._common import device_function, tl
from ._rows import _exp

RELU, GELU, SILU = (tl.constexpr(i) for i in (1, 2, 3))
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8)  # of the option out_dtype


class Epilogue(NamedTuple):
    """The epilogue's tensors as one kernel argument; absent ones are None."""

    x_scale: Any  # [M] float32, any stride
    x_scale_stride: Any
    w_scale: Any  # [N] float32
    bias: Any  # [N]
    residual: Any  # [M, N], last stride 1
    residual_stride: Any
    out_scale: Any
    out: Any  # [M, N], contiguous


def epilogue(x, x_scale, w_scale, bias, residual, out_dtype, out_scale):
    """The argument, with a new tensor for the result. Vectors of N may be expanded."""
    w_scale, bias = (None if t is None else t.contiguous() for t in (w_scale, bias))
    out = torch.empty((x.shape[0], w_scale.shape[0]), dtype=OUT_DTYPES[out_dtype], device=x.device)
    stride = None if residual is None else residual.stride(0)
    scale = None if out_scale is None else float(out_scale)
    return Epilogue(x_scale, x_scale.stride(0), w_scale, bias, residual, stride, scale, out)


@device_function
def _activation(y, ACT: tl.constexpr):
    if ACT == RELU:
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays NaN
    elif ACT == GELU:
        y = y * (0.5 + 0.5 * tl.erf(y * 0.7071067811865476))
    elif ACT == SILU:
        y = y / (1.0 + _exp(-y))
    return y


@device_function
def _round_half_even(y):
    """Of |y| < 2^22: from 2^23 to 2^24 float32 has steps of 1."""
    return (y + 12582912.0) - 12582912.0


@device_function
def _saturated(y, LOW: tl.constexpr):
    """Clamped to [LOW, 127]; 0 where it is NaN."""
    return tl.where(y == y, tl.minimum(tl.maximum(y, LOW), 127.0), 0.0)


@device_function
def _finish(acc, e, row, column, M, N, ACT: tl.constexpr):
    """Stores rows and columns of the result below M and N, from the exact sums."""
    ok = (row < M)[:, None] & (column < N)[None, :]
    target = e.out + row.to(tl.int64)[:, None] * N + column[None, :]
    if e.out.dtype.element_ty == tl.int32:
        tl.store(target, acc, mask=ok)
    else:
        x_scale = tl.load(e.x_scale + row.to(tl.int64) * e.x_scale_stride, mask=row < M, other=0.0)
        w_scale = tl.load(e.w_scale + column, mask=column < N, other=0.0)
        y = acc.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
        if e.bias is not None:
            y += tl.load(e.bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        if e.residual is not None:
            source = e.residual + row.to(tl.int64)[:, None] * e.residual_stride + column[None, :]
            y += tl.load(source, mask=ok, other=0.0).to(tl.float32)
        y = _activation(y, ACT)
        if e.out.dtype.element_ty == tl.int8:
            y = _round_half_even(_saturated(tl.div_rn(y, e.out_scale), -128.0))
        tl.store(target, y.to(e.out.dtype.element_ty), mask=ok)


def sample_epilogues(M, N):
    """(name, arguments) of calls for tests/test_triton_aot.py: every activation, every output dtype."""
    x_scale, w_scale = (torch.empty(n, device="meta") for n in (M, N))
    bias = torch.empty(N, dtype=torch.bfloat16, device="meta")
    for out_dtype, dtype in enumerate(OUT_DTYPES):
        call = {"x_scale": x_scale, "w_scale": w_scale, "out_dtype": out_dtype}
        if dtype == torch.int8:
            call |= {"bias": bias, "activation": GELU.value, "out_scale": 0.1}
        elif dtype != torch.int32:
            residual = torch.empty((M, N), dtype=dtype, device="meta")
            call |= {"bias": bias, "residual": residual, "activation": out_dtype + 1}
        yield str(dtype).removeprefix("torch."), call
