"""int_layer_norm with an int8 result against PyTorch's LayerNorm in floating point, at the shapes of tokens."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import itertools
import math

import torch
import torch.nn.functional as F

import effvit  # noqa: F401
from effvit.ops._op import Cost

KINDS = {torch.int32: 0.001, torch.int16: 0.001, torch.int8: 0.03}  # of x: what a step is worth
SHAPES = {
    "DeiT-S 8x197x384": ((8, 197, 384), "default"),
    "Swin-T stage 1 8x3136x96": ((8, 3136, 96), "default"),
    "Swin-T stage 4 8x49x768": ((8, 49, 768), "default"),
    "smoke 7x20": ((7, 20), "smoke"),
}


def _call(x, x_int):
    columns = x.shape[-1]
    bias = torch.zeros(columns, dtype=torch.int32)
    multiplier, shift = (torch.full((columns,), i, dtype=torch.int32) for i in (2**30 + 5, 53))
    return lambda: torch.ops.effvit.int_layer_norm(x_int, bias, multiplier, shift, out_dtype=4)


def _float(x, x_int):
    weight, bias = torch.ones(x.shape[-1], dtype=x.dtype), torch.zeros(x.shape[-1], dtype=x.dtype)
    return lambda: F.layer_norm(x, x.shape[-1:], weight, bias)


def _inputs(dtype, device, shape, kind, step):
    ends = torch.iinfo(kind)
    x_int = (torch.randn(shape) / step).round().clamp(ends.min, ends.max).to(kind).to(device)
    return {"x": (x_int * step).to(dtype), "x_int": x_int}


def cases():
    for (name, (shape, tag)), (kind, step) in itertools.product(SHAPES.items(), KINDS.items()):
        n, size = math.prod(shape), kind.itemsize
        yield Case(
            shape=f"{name} {str(kind)[6:]}" if kind != torch.int32 else name,
            inputs=lambda dtype, device, shape=shape, kind=kind, step=step: _inputs(dtype, device, shape, kind, step),
            effvit=_call,
            peers={"eager": _float},
            reference=_float,
            cost=lambda direction, dtype, n=n, size=size: Cost(12 * n, (1 + size) * n),
            unchecked=("effvit",),  # integers, which the suite compares bit by bit
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("int_layer_norm", cases()))
