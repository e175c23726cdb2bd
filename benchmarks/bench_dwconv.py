"""dwconv against conv2d and conv1d of PyTorch, maps channels last (`eager`) and channels first, each as it lies.

`compile` is the faster of the two: channels last, but of sequences forward and backward channels first.
"""

import functools

from harness import DIRECTIONS, Case, Cost, main  # first: it pins the threads before torch starts any

# isort: split
import torch
import torch.nn.functional as F

import effvit.ops
from effvit.reference.dwconv import dwconv as definition
from effvit.testing.dwconv import NONE, SPEC

SHAPES = {  # shape of the map, or of the sequence; kernel, tag
    "3x3 4x56x56x96": ((4, 56, 56, 96), (3, 3), "default"),
    "7x7 4x56x56x96": ((4, 56, 56, 96), (7, 7), "default"),
    "7x7 8x14x14x384": ((8, 14, 14, 384), (7, 7), "default"),
    "13x13 4x56x56x96": ((4, 56, 56, 96), (13, 13), "default"),
    "31x31 4x28x28x192": ((4, 28, 28, 192), (31, 31), "default"),
    "1x11 8x28x28x96": ((8, 28, 28, 96), (1, 11), "default"),
    "11x1 8x28x28x96": ((8, 28, 28, 96), (11, 1), "default"),
    "causal 3 4x1024x768": ((4, 1024, 768), (3,), "default"),
    "causal 4 4x4096x384": ((4, 4096, 384), (4,), "default"),
    "causal 4 1x2048x1536": ((1, 2048, 1536), (4,), "default"),
    "5x5 8x28x28x384": ((8, 28, 28, 384), (5, 5), "extended"),
    "causal 31 4x1024x384": ((4, 1024, 384), (31,), "extended"),
    "smoke 2x5x6x8": ((2, 5, 6, 8), (3, 3), "smoke"),
    "smoke causal 2x9x8": ((2, 9, 8), (4,), "smoke"),
}


def padding_of(k):
    """(before, after): "same", or for sequences all before."""
    return ([0, k[0] - 1], [0, 0]) if len(k) == 1 else ([n // 2 for n in k], [n - 1 - n // 2 for n in k])


def peer(k, first):
    """A convolution by PyTorch; `first`: the map has its channels first in memory."""

    def make(x, weight, bias):
        if first:
            order = (0, 2, 1) if len(k) == 1 else (0, 3, 1, 2)
            back = (0, 2, 1) if len(k) == 1 else (0, 2, 3, 1)
            x = x.detach().permute(order).contiguous().permute(back).requires_grad_(x.requires_grad)

        def convolve():
            C = x.shape[-1]
            if len(k) == 1 and first:
                return F.conv1d(x.mT, weight, bias, padding=k[0] - 1, groups=C)[..., : x.shape[1]].mT
            if len(k) == 1:
                maps = x.mT.unsqueeze(2)
                return F.conv2d(maps, weight.unsqueeze(2), bias, padding=(0, k[0] - 1), groups=C)[
                    :, :, 0, : x.shape[1]
                ].mT
            y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=[n // 2 for n in k], groups=C)
            return y.permute(0, 2, 3, 1)

        return convolve, {"x": [x], "weight": [weight], "bias": [bias]}

    return make


def truth(k):
    before, after = padding_of(k)

    def make(x, weight, bias):
        x, weight = (x.unsqueeze(1), weight) if len(k) == 1 else (x, weight.squeeze(1))
        call = functools.partial(definition, x, weight, bias, before=before, after=after)
        return lambda: call().squeeze(1) if len(k) == 1 else call()

    return make


def cases():
    for name, (shape, k, tag) in SHAPES.items():

        def inputs(dtype, device, shape=shape, k=k):
            C = shape[-1]
            weight = torch.randn(C, 1, *k) / torch.tensor(k).prod() ** 0.5
            return {n: t.to(device, dtype) for n, t in
                    {"x": torch.randn(shape), "weight": weight, "bias": torch.randn(C)}.items()}  # fmt: skip

        def price(direction, dtype, shape=shape, k=k):
            flat = len(k) == 1
            sizes = ((shape[0], 1, *shape[1:]) if flat else shape, (shape[-1], *((1, *k) if flat else k)), shape[-1:])
            args = tuple(torch.empty(s, dtype=dtype, device="meta") for s in sizes)
            before, after = padding_of(k)
            options = {"before": before, "after": after, "dilation": [1, 1], "window": [0, 0], "act": NONE}
            calls = [SPEC.cost(args, options, b) for b in (False, True)][: 1 if direction == "forward" else 2]
            return Cost(sum(c.flops for c in calls), sum(c.bytes for c in calls))

        def ours(x, weight, bias, k=k):
            return functools.partial(effvit.ops.dwconv, x, weight, bias, causal=len(k) == 1)

        for direction in DIRECTIONS:
            yield Case(
                shape=name,
                inputs=inputs,
                effvit=ours,
                peers={"eager": peer(k, False), "channels first": peer(k, True)},
                reference=truth(k),
                compiled="eager" if len(k) == 2 or direction == "forward" else "channels first",
                cost=price,
                wrt=("x", "weight", "bias"),
                memory=tag == "smoke" or name.startswith("7x7 4x56"),
                directions=(direction,),
                tags=(tag,),
            )


if __name__ == "__main__":
    raise SystemExit(main("dwconv", cases()))
