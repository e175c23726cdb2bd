"""dequantize_lut against indexing in PyTorch, eager and compiled."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import math

import torch

import effvit  # noqa: F401
from effvit import quantizers
from effvit.ops._op import Cost
from effvit.ops.dequantize_lut import DTYPES

SHAPES = {  # shape, bits, tag
    "DeiT-S softmax 8x6x197x197 4 bits": ((8, 6, 197, 197), 4, "default"),
    "DeiT-S softmax 8x6x197x197 8 bits": ((8, 6, 197, 197), 8, "default"),
    "Swin-T stage 1 softmax 512x3x49x49 4 bits": ((512, 3, 49, 49), 4, "default"),
    "smoke 2x3x20 3 bits": ((2, 3, 20), 3, "smoke"),
}


def inputs(dtype, device, shape, bits):
    """The values are those of the scheme, in float32; `like` has the dtype of the result."""
    made = quantizers.log_sqrt2(bits)
    q = made.quantize(torch.softmax(2 * torch.randn(shape), -1))
    values = made.tables()[1].flip(0).contiguous()
    return {"q": q.to(device), "values": values.to(device), "like": torch.zeros(1, dtype=dtype, device=device)}


def indexed(q, values, like):
    return lambda: values[q.long()].to(like.dtype)


def cases():
    for name, (shape, bits, tag) in SHAPES.items():
        n = math.prod(shape)
        yield Case(
            shape=name,
            inputs=lambda dtype, device, shape=shape, bits=bits: inputs(dtype, device, shape, bits),
            effvit=lambda q, values, like: (
                lambda: torch.ops.effvit.dequantize_lut(q, values, out_dtype=DTYPES[like.dtype])
            ),
            peers={"eager": indexed},
            reference=lambda q, values, like: lambda: values[q.long()],
            cost=lambda direction, dtype, n=n: Cost(n, n * (dtype.itemsize + 1)),
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("dequantize_lut", cases()))
