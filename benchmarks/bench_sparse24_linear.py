"""sparse24_linear against the dense linear layer of the same dtype, and against decompressing the weight before it.

`dense` keeps the zeros as weights: it needs twice the memory, and its gradient is of all places. `decompress` is what
there is without the kernel: the weight is made dense in every call, and gradients go back to the kept places.
"""

import functools

from harness import Case, main, price_of  # first: it pins the threads before torch starts any

# isort: split
import torch
import torch.nn.functional as F

import effvit
from effvit.reference.sparse24_linear import sparse24_linear as definition
from effvit.testing._sparse24 import compressed
from effvit.testing.sparse24_linear import SPEC

SHAPES = {  # M, K, N, tag
    "DeiT-S fc1 197x384x1536": (197, 384, 1536, "default"),
    "DeiT-S fc2 197x1536x384": (197, 1536, 384, "default"),
    "DeiT-B fc1 197x768x3072": (197, 768, 3072, "default"),
    "DeiT-B fc2 197x3072x768": (197, 3072, 768, "default"),
    "DeiT-B fc1 8x197x768x3072": (1576, 768, 3072, "default"),
    "DeiT-B fc2 8x197x3072x768": (1576, 3072, 768, "default"),
    "1 row 1x768x3072": (1, 768, 3072, "default"),
    "16 rows 16x768x3072": (16, 768, 3072, "default"),
    "DeiT-S fc1 8x197x384x1536": (1576, 384, 1536, "extended"),
    "DeiT-S fc2 8x197x1536x384": (1576, 1536, 384, "extended"),
    "1 row 1x3072x768": (1, 3072, 768, "extended"),
    "16 rows 16x3072x768": (16, 3072, 768, "extended"),
    "smoke 5x20x12": (5, 20, 12, "smoke"),
}


def inputs(m, k, n, dtype, device):
    values, meta = compressed(n, k, torch.float32, torch.Generator().manual_seed(0))
    x, bias = torch.randn(m, k), torch.randn(n)
    tensors = {"x": x, "values": values / k**0.5, "bias": bias}
    return {"meta": meta.to(device), **{name: t.to(device, dtype) for name, t in tensors.items()}}


def ours(x, values, meta, bias):
    return functools.partial(effvit.sparse24_linear, x, values, meta, bias)


def decompress(x, values, meta, bias):
    return lambda: F.linear(x, effvit.sparse24_decompress(values, meta), bias)


def dense(x, values, meta, bias):
    w = effvit.sparse24_decompress(values.detach(), meta).requires_grad_(values.requires_grad)
    return (lambda: F.linear(x, w, bias)), {"x": [x], "w": [w], "bias": [bias]}


def exact(x, values, meta, bias):
    return functools.partial(definition, x, values, meta, bias)


def cost(direction, dtype, m, k, n):
    args = [torch.empty(shape, dtype=dtype, device="meta") for shape in ((m, k), (n, k // 2), (n, (k + 7) // 8), (n,))]
    args[2] = args[2].to(torch.uint8)
    return price_of(lambda _, kwargs, backward: SPEC.cost(args, kwargs, backward), [])(direction, dtype)


def cases():
    for name, (m, k, n, tag) in SHAPES.items():
        yield Case(
            shape=name,
            inputs=functools.partial(inputs, m, k, n),
            effvit=ours,
            peers={"decompress": decompress, "dense": dense},
            reference=exact,
            cost=functools.partial(cost, m=m, k=k, n=n),
            wrt=("x", "values", "bias"),
            baseline="decompress",
            compiled=None,
            unchecked=("dense",),
            directions=("forward",) if m <= 16 and tag != "smoke" else ("forward", "forward+backward"),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("sparse24_linear", cases()))
