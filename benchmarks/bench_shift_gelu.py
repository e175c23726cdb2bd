"""shift_gelu with an int8 result against PyTorch's exact GELU in floating point, at the shapes of MLPs."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import math

import torch
import torch.nn.functional as F

import effvit  # noqa: F401
from effvit.ops._op import Cost

SCALE = 0.05
SHAPES = {
    "DeiT-S hidden 8x197x1536": ((8, 197, 1536), "default"),
    "Swin-T stage 1 hidden 2x3136x384": ((2, 3136, 384), "default"),
    "Swin-T stage 4 hidden 8x49x3072": ((8, 49, 3072), "default"),
    "smoke 7x20": ((7, 20), "smoke"),
}


def _call(x, x_int):
    return lambda: torch.ops.effvit.shift_gelu(x_int, x0=-12, multiplier=2**30, shift=37, out_dtype=4)


def _inputs(dtype, device, shape):
    x_int = (torch.randn(shape) / SCALE).round().to(torch.int32).to(device)
    return {"x": (x_int * SCALE).to(dtype), "x_int": x_int}


def cases():
    for name, (shape, tag) in SHAPES.items():
        n = math.prod(shape)
        yield Case(
            shape=name,
            inputs=lambda dtype, device, shape=shape: _inputs(dtype, device, shape),
            effvit=_call,
            peers={"eager": lambda x, x_int: lambda: F.gelu(x)},
            reference=lambda x, x_int: lambda: F.gelu(x),
            cost=lambda direction, dtype, n=n: Cost(25 * n, 5 * n),
            unchecked=("effvit",),  # integers, which the suite compares bit by bit
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("shift_gelu", cases()))
