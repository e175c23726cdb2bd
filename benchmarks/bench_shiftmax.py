"""shiftmax with an int8 result against PyTorch's softmax in floating point, at the shapes of attention scores."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import itertools
import math

import torch

import effvit  # noqa: F401
from effvit.ops._op import Cost

KINDS = {torch.int32: 0.05, torch.int16: 0.05, torch.int8: 0.05}  # of x: what a step is worth
SHAPES = {
    "DeiT-S 8x6x197x197": ((8, 6, 197, 197), "default"),
    "Swin-T stage 1 512x3x49x49": ((512, 3, 49, 49), "default"),
    "Swin-T stage 4 8x24x49x49": ((8, 24, 49, 49), "default"),
    "1024 tokens 1x6x1024x1024": ((1, 6, 1024, 1024), "default"),
    "smoke 2x7x20": ((2, 7, 20), "smoke"),
}


def _call(x, x_int):
    return lambda: torch.ops.effvit.shiftmax(x_int, x0=-20)


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
            peers={"eager": lambda x, x_int: lambda: torch.softmax(x, -1)},
            reference=lambda x, x_int: lambda: torch.softmax(x, -1),
            cost=lambda direction, dtype, n=n, size=size: Cost(20 * n, (1 + size) * n),
            unchecked=("effvit",),  # integers, which the suite compares bit by bit
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("shiftmax", cases()))
