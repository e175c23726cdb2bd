"""shift_gelu with an int8 result against PyTorch's exact GELU in floating point, at the shapes of MLPs."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import itertools
import math

import torch
import torch.nn.functional as F

import effvit  # noqa: F401
from effvit.ops._op import Cost

# Of x: its dtype, and what a step is worth. Rows of more than 256 values are "wide".
KINDS = {
    "": (torch.int32, 0.05),
    "wide": (torch.int32, 0.003),
    "int16": (torch.int16, 0.05),
    "wide int16": (torch.int16, 0.003),
    "int8": (torch.int8, 0.05),
}
SHAPES = {
    "DeiT-S hidden 8x197x1536": ((8, 197, 1536), "default"),
    "Swin-T stage 1 hidden 2x3136x384": ((2, 3136, 384), "default"),
    "Swin-T stage 4 hidden 8x49x3072": ((8, 49, 3072), "default"),
    "smoke 7x20": ((7, 20), "smoke"),
}


def _call(step):
    options = {"x0": math.floor(-1 / (1.702 * step)), "multiplier": 1_288_490_189, "shift": 37, "out_dtype": 4}
    return lambda x, x_int: lambda: torch.ops.effvit.shift_gelu(x_int, **options)


def _inputs(dtype, device, shape, kind, step):
    ends = torch.iinfo(kind)
    x_int = (torch.randn(shape) / step).round().clamp(ends.min, ends.max).to(kind).to(device)
    return {"x": (x_int * step).to(dtype), "x_int": x_int}


def cases():
    for (name, (shape, tag)), (title, (kind, step)) in itertools.product(SHAPES.items(), KINDS.items()):
        n, size = math.prod(shape), kind.itemsize
        yield Case(
            shape=f"{name} {title}".rstrip(),
            inputs=lambda dtype, device, shape=shape, kind=kind, step=step: _inputs(dtype, device, shape, kind, step),
            effvit=_call(step),
            peers={"eager": lambda x, x_int: lambda: F.gelu(x)},
            reference=lambda x, x_int: lambda: F.gelu(x),
            cost=lambda direction, dtype, n=n, size=size: Cost(25 * n, (1 + size) * n),
            unchecked=("effvit",),  # integers, which the suite compares bit by bit
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("shift_gelu", cases()))
