"""quantize_lut against the formulas of its quantisers in PyTorch, eager and compiled: logarithm, rounding, clamping."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import math

import torch

import effvit.ops
from effvit import quantizers
from effvit.ops._op import Cost

SHAPES = {  # shape, scheme, bits, tag
    "DeiT-S softmax 8x6x197x197 log2 4 bits": ((8, 6, 197, 197), "log2", 4, "default"),
    "DeiT-S softmax 8x6x197x197 log_sqrt2 4 bits": ((8, 6, 197, 197), "log_sqrt2", 4, "default"),
    "DeiT-S softmax 8x6x197x197 log_sqrt2 6 bits": ((8, 6, 197, 197), "log_sqrt2", 6, "default"),
    "DeiT-S softmax 8x6x197x197 adalog 8 bits": ((8, 6, 197, 197), "adalog", 8, "default"),
    "Swin-T stage 1 softmax 512x3x49x49 log_sqrt2 4 bits": ((512, 3, 49, 49), "log_sqrt2", 4, "default"),
    "Swin-T stage 1 softmax 512x3x49x49 tan 4 bits": ((512, 3, 49, 49), "tan", 4, "default"),
    "DeiT-S hidden 8x197x1536 uniform 4 bits": ((8, 197, 1536), "uniform", 4, "default"),
    "smoke 2x3x20 log2 3 bits": ((2, 3, 20), "log2", 3, "smoke"),
}
ALPHA, Q = 1.2, 20
OPTIONS = {"adalog": {"q": Q}, "tan": {"alpha": ALPHA}, "uniform": {"scale": 1 / 15}}
FACTORS = {"log2": 1.0, "log_sqrt2": 2.0, "adalog": 37 / Q}


def quantizer(scheme, bits):
    return getattr(quantizers, scheme)(bits, **OPTIONS.get(scheme, {}))


def codes(x, scheme, bits, levels):
    """As the papers' code computes them, in the dtype of x."""
    if scheme == "uniform":
        return (x * 15).round().clamp(0, 2**bits - 1)
    if scheme == "tan":
        n = 2**bits - 1
        y = torch.tan(ALPHA * (2 * x.clamp(0, 1) - 1)) / math.tan(ALPHA)
        return ((1 + y) * (n / 2)).round().clamp(0, n)
    return (-x.log2() * FACTORS[scheme]).round().clamp(0, levels - 1)


def inputs(dtype, device, shape):
    return {"x": torch.softmax(2 * torch.randn(shape), -1).to(device, dtype)}


def ours(scheme, bits):
    def make(x):
        made = quantizer(scheme, bits)
        thresholds = made.tables(x.device)[0]
        return lambda: effvit.ops.quantize_lut(x, thresholds, descending=made.descending)

    return make


def cases():
    for name, (shape, scheme, bits, tag) in SHAPES.items():
        n, levels = math.prod(shape), quantizer(scheme, bits).levels
        yield Case(
            shape=name,
            inputs=lambda dtype, device, shape=shape: inputs(dtype, device, shape),
            effvit=ours(scheme, bits),
            peers={"eager": lambda x, o=(scheme, bits, levels): lambda: codes(x.float(), *o).to(torch.uint8)},
            reference=lambda x, o=(scheme, bits, levels): lambda: codes(x, *o),
            cost=lambda direction, dtype, n=n, bits=bits: Cost(bits * n, n * (dtype.itemsize + 1)),
            unchecked=("effvit", "eager", "compile"),  # integers: the suite compares ours; a formula in floats is off
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("quantize_lut", cases()))
