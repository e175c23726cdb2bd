"""int8_matmul with an int8 result against PyTorch's product in floating point, at the shapes of attention."""

from harness import Case, main  # first: it pins the threads before torch starts any

# isort: split
import functools

import torch

import effvit
from effvit.ops._op import Cost

I8, U8, I16 = torch.int8, torch.uint8, torch.int16
SHAPES = {  # leading dims, M, N, K, dtype of a, b transposed, tag
    "DeiT-S scores 48x197x197x64": ((8, 6), 197, 197, 64, I8, True, "default"),
    "DeiT-S context 48x197x64x197": ((8, 6), 197, 64, 197, I8, False, "default"),
    "DeiT-S context, 16 bits": ((8, 6), 197, 64, 197, I16, False, "default"),
    "Swin-T scores 192x49x49x32": ((64, 3), 49, 49, 32, I8, True, "default"),
    "Swin-T context 192x49x32x49": ((64, 3), 49, 32, 49, I8, False, "default"),
    "one matrix 512x512x512": ((), 512, 512, 512, I8, True, "default"),
    "one matrix 512x512x512, unsigned": ((), 512, 512, 512, U8, True, "default"),
    "smoke 2x7x9x20": ((2,), 7, 9, 20, I8, True, "smoke"),
}


def _inputs(dtype, device, lead, m, n, k, a_dtype, transposed):
    low, high = (0, 255) if a_dtype == U8 else (-127, 127)
    a = torch.randint(low, high, (*lead, m, k), dtype=torch.int32).to(device)
    b = torch.randint(-127, 128, (*lead, n, k) if transposed else (*lead, k, n), dtype=torch.int32).to(device)
    floats = a.to(dtype), (b.transpose(-1, -2) if transposed else b).to(dtype)
    return {"a": a.to(a_dtype), "b": b.to(I8), "x": floats[0], "y": floats[1]}


def _effvit(a, b, x, y, transposed):
    scale = 1 / (60 * a.shape[-1] ** 0.5)
    return functools.partial(
        effvit.int8_matmul, a, b, transpose_b=transposed, scale=scale, out_scale=1.0, out_dtype=torch.int8
    )


def _floats(a, b, x, y):
    return lambda: x @ y


def cases():
    for name, (lead, m, n, k, a_dtype, transposed, tag) in SHAPES.items():
        batches = torch.Size(lead).numel()
        price = Cost(2 * batches * m * n * k, batches * (m * k * a_dtype.itemsize + n * k + m * n))
        yield Case(
            shape=name,
            inputs=lambda dtype, device, s=(lead, m, n, k, a_dtype, transposed): _inputs(dtype, device, *s),
            effvit=functools.partial(_effvit, transposed=transposed),
            peers={"matmul": _floats},
            reference=_floats,
            baseline="matmul",
            compiled=None,
            products=torch.int8,
            cost=lambda direction, dtype, price=price: price,
            unchecked=("effvit",),  # integers, which the suite compares bit by bit
            directions=("forward",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("int8_matmul", cases()))
