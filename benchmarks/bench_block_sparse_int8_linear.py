"""block_sparse_int8_linear against int8_linear on the dense weight, packed beforehand, and the peers of
bench_int8_linear.py. Half of the blocks are there, or a quarter.
"""

import functools

from harness import Case, Cost, main  # first: it pins the threads before torch starts any

# isort: split
import torch
from bench_block_sparse_linear import SHAPES
from bench_int8_linear import dense, exact, floats, int_mm, onednn

import effvit
from effvit import block_sparse


def inputs(m, k, n, block, kept, dtype, device):
    mask = block_sparse.mask(torch.randn(n, k), density=kept / 100, block=block).to(device)
    return {
        "x": torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device),
        "w": torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device) * mask,
        "x_scale": torch.full((m,), 0.02, device=device),
        "w_scale": (0.5 + torch.rand(n, device=device)) / (100 * k**0.5),
        "bias": torch.randn(n, device=device),
    }


def ours(block, x, w, x_scale, w_scale, bias):
    values, crow, columns = block_sparse.compress(w.float(), block=block)
    parts = (values.to(torch.int8), crow, columns)
    return functools.partial(effvit.block_sparse_int8_linear, x, *parts, x_scale, w_scale, bias)


def cases():
    def peer(make, **options):
        return functools.partial(make, activation="none", **options)

    for name, (m, k, n, block, tag) in SHAPES.items():
        for kept in (50, 25):
            yield Case(
                shape=f"{name} {kept} %",
                inputs=functools.partial(inputs, m, k, n, block, kept),
                effvit=functools.partial(ours, block),
                peers={
                    "int_mm": peer(int_mm, out_dtype=torch.float32),
                    "onednn": peer(onednn, out_dtype=torch.float32),
                    "float32": peer(floats, dtype=torch.float32),
                    "bfloat16": peer(floats, dtype=torch.bfloat16),
                    "dense int8": peer(dense, out_dtype=torch.float32),
                },
                reference=peer(exact),
                cost=lambda direction, dtype, m=m, k=k, n=n, kept=kept: Cost(
                    2 * m * n * k * kept // 100, m * k + n * k * kept // 100 + 4 * m * n
                ),
                baseline="int_mm",
                compiled="int_mm",
                unchecked=("float32", "bfloat16"),
                products=torch.int8,
                directions=("forward",),
                tags=(tag,),
            )


if __name__ == "__main__":
    raise SystemExit(main("block_sparse_int8_linear", cases()))
