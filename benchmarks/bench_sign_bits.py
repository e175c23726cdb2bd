"""sign_bits against its formula in eager PyTorch: a comparison, bits to bytes, the mean of |x|."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit
from effvit.ops._op import Cost
from effvit.reference.sign_bits import sign_bits as definition

SHAPES = {  # rows, K, tag
    "DeiT-S 8x197x384": (1576, 384, "default"),
    "DeiT-S hidden 8x197x1536": (1576, 1536, "default"),
    "Swin-T stage 1 8x3136x96": (25088, 96, "default"),
    "1 row 1x768": (1, 768, "default"),
    "smoke 3x20": (3, 20, "smoke"),
}


def cases():
    for name, (rows, k, tag) in SHAPES.items():
        yield Case(
            shape=name,
            inputs=lambda dtype, device, shape=(rows, k): {"x": torch.randn(shape).to(device, dtype)},
            effvit=lambda x: lambda: effvit.sign_bits(x)[0],
            peers={"eager": lambda x: lambda: definition(x.float())[0]},
            reference=lambda x: lambda: definition(x)[0].double(),
            cost=lambda direction, dtype, rows=rows, n=rows * k: Cost(2 * n, n * dtype.itemsize + n // 8 + 4 * rows),
            unchecked=("effvit", "compile"),  # bytes: the suite compares them bit by bit
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("sign_bits", cases()))
