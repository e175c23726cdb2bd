"""quantize_int8 against its formula in eager PyTorch and torch.compile: a token's largest |x|, division, rounding."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit
from effvit.ops._op import Cost
from effvit.reference.quantize_int8 import row_scale, steps

SHAPES = {  # rows, K, tag
    "DeiT-S 8x197x384": (1576, 384, "default"),
    "DeiT-S hidden 8x197x1536": (1576, 1536, "default"),
    "Swin-T stage 1 8x3136x96": (25088, 96, "default"),
    "Swin-T stage 4 8x49x768": (392, 768, "default"),
    "1 row 1x768": (1, 768, "default"),
    "smoke 3x20": (3, 20, "smoke"),
}


def formula(x):
    def run():
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        return (x.float() / scale).round().clamp(-127, 127).to(torch.int8)

    return run


def exact(x):
    return lambda: steps(x, row_scale(x)).round()


def cases():
    for name, (rows, k, tag) in SHAPES.items():
        yield Case(
            shape=name,
            inputs=lambda dtype, device, shape=(rows, k): {"x": torch.randn(shape).to(device, dtype)},
            effvit=lambda x: lambda: effvit.ops.quantize_int8(x)[0],
            peers={"eager": formula},
            reference=exact,
            cost=lambda direction, dtype, rows=rows, n=rows * k: Cost(3 * n, n * (dtype.itemsize + 1) + 4 * rows),
            unchecked=("effvit", "compile"),  # the suite does, bit by bit; a tie of float64 may fall otherwise
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("quantize_int8", cases()))
