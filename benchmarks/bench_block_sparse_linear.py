"""block_sparse_linear against the dense linear layer of the same shape, PyTorch's own product with a BSR matrix, and
the definition in eager PyTorch and torch.compile. Half of the blocks are there, or a quarter.

The dense layer has the same weight with its zeros; its gradient is that of all weights, so it is not compared.
"""

import functools

from harness import Case, Cost, main  # first: it pins the threads before torch starts any

# isort: split
import torch
import torch.nn.functional as F

import effvit
from effvit import block_sparse
from effvit.reference.block_sparse_linear import block_sparse_linear as definition
from effvit.testing.block_sparse_linear import SPEC

SHAPES = {  # M, K, N, block, tag
    "DeiT-S fc1 197x384x1536 b32": (197, 384, 1536, 32, "default"),
    "DeiT-S fc2 197x1536x384 b32": (197, 1536, 384, 32, "default"),
    "DeiT-S fc1 197x384x1536 b16": (197, 384, 1536, 16, "default"),
    "DeiT-B fc1 8x197x768x3072 b32": (1576, 768, 3072, 32, "default"),
    "DeiT-B fc2 8x197x3072x768 b32": (1576, 3072, 768, 32, "default"),
    "DeiT-B fc2 8x197x3072x768 b16": (1576, 3072, 768, 16, "default"),
    "smoke 5x64x96 b16": (5, 64, 96, 16, "smoke"),
}
NAMES = ("x", "values", "crow", "columns", "bias")


def dense(x, values, crow, columns, bias):
    w = block_sparse.decompress(values.detach(), crow, columns, x.shape[-1]).requires_grad_()
    return lambda: F.linear(x, w, bias), {"x": [x], "values": [w], "bias": [bias]}


def bsr(x, values, crow, columns, bias):
    """MKL's, in float32 and forward only."""
    size = ((len(crow) - 1) * values.shape[-1], x.shape[-1])
    w = torch.sparse_bsr_tensor(crow, columns, values.detach(), size)
    return lambda: (w @ x.t()).t() + bias


def cases():
    for name, (m, k, n, block, tag) in SHAPES.items():
        for kept in (50, 25):

            def inputs(dtype, device, m=m, k=k, n=n, block=block, kept=kept):
                w = torch.randn(n, k) * (kept / 100 * k) ** -0.5
                mask = block_sparse.mask(w, density=kept / 100, block=block)
                values, crow, columns = block_sparse.compress(w, block=block, mask=mask)
                floats = {"x": torch.randn(m, k), "values": values, "bias": torch.randn(n)}
                floats = {name: t.to(device, dtype) for name, t in floats.items()}
                return floats | {"crow": crow.to(device), "columns": columns.to(device)}

            def price(direction, dtype, m=m, k=k, n=n, block=block, kept=kept):
                z = round(kept / 100 * n * k / block**2)
                make = functools.partial(torch.empty, dtype=dtype, device="meta")
                places = (torch.empty(size, dtype=torch.int32, device="meta") for size in (n // block + 1, z))
                args = (make(m, k), make(z, block, block), *places, make(n))
                calls = [SPEC.cost(args, {"activation": 0}, backward) for backward in (False, True)]
                calls = calls[: 1 if direction == "forward" else 2]
                return Cost(sum(c.flops for c in calls), sum(c.bytes for c in calls))

            def of(function):
                return lambda **t: functools.partial(function, *(t[n] for n in NAMES))

            yield Case(
                shape=f"{name} {kept} %",
                inputs=inputs,
                effvit=of(effvit.block_sparse_linear),
                peers={"eager": of(definition), "dense": dense, "bsr": bsr},
                reference=of(definition),
                cost=price,
                wrt=("x", "values", "bias"),
                unchecked=("dense",),
                tags=(tag,),
            )


if __name__ == "__main__":
    raise SystemExit(main("block_sparse_linear", cases()))
