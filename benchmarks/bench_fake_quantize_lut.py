"""fake_quantize_lut against quantising and dequantising by formula in PyTorch, eager and compiled."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import math

import torch
from bench_quantize_lut import OPTIONS, SHAPES, Q, inputs, quantizer

import effvit.ops
from effvit import quantizers
from effvit.ops._op import Cost


def formula(x, scheme, bits, levels, table):
    """As the papers' code computes it: codes, a mask for zero, and what they are worth."""
    if scheme == "uniform":
        scale = OPTIONS[scheme]["scale"]
        return (x / scale).round().clamp(0, 2**bits - 1) * scale
    if scheme == "tan":
        n, alpha = 2**bits - 1, OPTIONS[scheme]["alpha"]
        q = ((1 + torch.tan(alpha * (2 * x.clamp(0, 1) - 1)) / math.tan(alpha)) * (n / 2)).round().clamp(0, n)
        return (1 + torch.atan((2 * q / n - 1) * math.tan(alpha)) / alpha) / 2
    last = levels - 1
    if scheme == "log2":
        q = (-x.log2()).round()
        return torch.where(q < last, torch.exp2(-q.clamp(0, last)), 0.0)
    if scheme == "log_sqrt2":
        q = (-2 * x.log2()).round()
        kept = q.clamp(0, last)
        return torch.where(q < last, torch.exp2(-(kept / 2).ceil()) * (kept % 2 * (2**0.5 - 1) + 1), 0.0)
    q = (-x.log2() * (37 / Q)).round()
    kept = q.clamp(0, last)
    worth = torch.exp2(-(kept * Q / 37).floor()) * table.to(x)[kept.long().clamp(max=len(table) - 1)]
    return torch.where(q < last, worth, 0.0)


def ours(scheme, bits):
    def make(x):
        tables = quantizer(scheme, bits).tables(x.device)
        return lambda: effvit.ops.fake_quantize_lut(x, *tables)

    return make


def cases():
    for name, (shape, scheme, bits, tag) in SHAPES.items():
        n, table = math.prod(shape), torch.tensor(quantizers.adalog_table(bits, Q))
        options = (scheme, bits, quantizer(scheme, bits).levels, table)
        yield Case(
            shape=name,
            inputs=lambda dtype, device, shape=shape: inputs(dtype, device, shape),
            effvit=ours(scheme, bits),
            peers={"eager": lambda x, o=options: lambda: formula(x.float(), *o).to(x.dtype)},
            reference=lambda x, o=options: lambda: formula(x, *o),
            cost=lambda direction, dtype, n=n, bits=bits: Cost((bits + 1) * n, 2 * n * dtype.itemsize),
            unchecked=("effvit", "eager", "compile"),  # a step beside the thresholds: the suite compares ours
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("fake_quantize_lut", cases()))
