"""int_add_layer_norm with an int8 result against an addition and a LayerNorm in floating point, at shapes of tokens."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import itertools
import math

import torch
import torch.nn.functional as F

import effvit
from effvit.ops._op import Cost

KINDS = {torch.int32: 0.001, torch.int16: 0.001, torch.int8: 0.03}  # of x: what a step is worth; others: 0.001
STEP = 0.001
SHAPES = {
    "DeiT-S 8x197x384": ((8, 197, 384), "default"),
    "Swin-T stage 1 8x3136x96": ((8, 3136, 96), "default"),
    "Swin-T stage 4 8x49x768": ((8, 49, 768), "default"),
    "smoke 7x20": ((7, 20), "smoke"),
}


def _call(step):
    def prepare(x, residual, x_int, residual_int):
        scales = (*effvit.integer.multipliers(step, STEP, x_int), *effvit.integer.multipliers(STEP, STEP, x_int))
        norm = effvit.integer.layer_norm_constants(torch.ones(x.shape[-1]), torch.zeros(x.shape[-1]), 0.03)
        return lambda: torch.ops.effvit.int_add_layer_norm(x_int, residual_int, *scales, *norm, out_dtype=4)

    return prepare


def _float(x, residual, x_int, residual_int):
    weight, bias = torch.ones(x.shape[-1], dtype=x.dtype), torch.zeros(x.shape[-1], dtype=x.dtype)

    return lambda: F.layer_norm(x + residual, x.shape[-1:], weight, bias)


def _inputs(dtype, device, shape, kind, step):
    ends = torch.iinfo(kind)
    x_int = (torch.randn(shape) / step).round().clamp(ends.min, ends.max).to(kind).to(device)
    residual_int = (torch.randn(shape) / STEP).round().to(torch.int16).to(device)
    return {
        "x": (x_int * step).to(dtype), "residual": (residual_int * STEP).to(dtype), "x_int": x_int,
        "residual_int": residual_int,
    }  # fmt: skip


def cases():
    for (name, (shape, tag)), (kind, step) in itertools.product(SHAPES.items(), KINDS.items()):
        n, size = math.prod(shape), kind.itemsize
        yield Case(
            shape=f"{name} {str(kind)[6:]}",
            inputs=lambda dtype, device, shape=shape, kind=kind, step=step: _inputs(dtype, device, shape, kind, step),
            effvit=_call(step),
            peers={"eager": _float},
            reference=_float,
            cost=lambda direction, dtype, n=n, size=size: Cost(20 * n, (5 + size) * n),
            unchecked=("effvit",),  # integers, which the suite compares bit by bit
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("int_add_layer_norm", cases()))
