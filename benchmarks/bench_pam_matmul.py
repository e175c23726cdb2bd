"""pam_matmul against a float32 product of the same shape, and against piecewise affine products in eager PyTorch.

A product with an addition of bits in place of each multiplication: the same numbers of bytes and of instructions as a
product without fused multiply-adds.
"""

import functools

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import torch
import torch.nn.functional as F

import effvit
from effvit.ops._op import Cost
from effvit.reference.pam_matmul import pam_matmul as definition

SHAPES = {  # M, K, N, zeros (after a ReLU), tag
    "DeiT-S proj 197x384x384": (197, 384, 384, False, "default"),
    "DeiT-S fc1 197x384x1536": (197, 384, 1536, False, "default"),
    "DeiT-S proj after relu 197x384x384": (197, 384, 384, True, "default"),
    "1 row 1x768x3072": (1, 768, 3072, False, "default"),
    "smoke 5x20x12": (5, 20, 12, True, "smoke"),
}


def inputs(m, k, n, zeros, dtype, device):
    x = torch.randn(m, k)
    return {"x": (x.relu() if zeros else x).to(device, dtype), "w": torch.randn(n, k).to(device, dtype)}


def cases():
    for name, (m, k, n, zeros, tag) in SHAPES.items():
        yield Case(
            shape=name,
            inputs=functools.partial(inputs, m, k, n, zeros),
            effvit=lambda x, w: lambda: effvit.pam_matmul(x, w),
            peers={"product": lambda x, w: lambda: F.linear(x, w)}
            | ({"eager": lambda x, w: lambda: definition(x, w)} if m * n * k < 1e7 else {}),
            reference=lambda x, w: lambda: definition(x, w),
            cost=lambda direction, dtype, m=m, k=k, n=n: Cost(2 * m * n * k, (m * k + n * k + m * n) * dtype.itemsize),
            baseline="product",
            compiled="product",
            unchecked=("product", "compile"),
            approximate={"effvit": 1e-5},  # of the norm; the suite has the products bit by bit
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("pam_matmul", cases()))
