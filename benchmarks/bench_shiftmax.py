"""shiftmax with an int8 result against PyTorch's softmax in floating point, at the shapes of attention scores."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import math

import torch

import effvit  # noqa: F401
from effvit.ops._op import Cost

SCALE = 0.05
SHAPES = {
    "DeiT-S 8x6x197x197": ((8, 6, 197, 197), "default"),
    "Swin-T stage 1 512x3x49x49": ((512, 3, 49, 49), "default"),
    "Swin-T stage 4 8x24x49x49": ((8, 24, 49, 49), "default"),
    "1024 tokens 1x6x1024x1024": ((1, 6, 1024, 1024), "default"),
    "smoke 2x7x20": ((2, 7, 20), "smoke"),
}


def _call(x, x_int):
    return lambda: torch.ops.effvit.shiftmax(x_int, x0=-20)


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
            peers={"eager": lambda x, x_int: lambda: torch.softmax(x, -1)},
            reference=lambda x, x_int: lambda: torch.softmax(x, -1),
            cost=lambda direction, dtype, n=n: Cost(20 * n, 5 * n),
            unchecked=("effvit",),  # integers, which the suite compares bit by bit
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("shiftmax", cases()))
