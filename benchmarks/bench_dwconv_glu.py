"""dwconv_glu against conv2d, activation and product in eager PyTorch and torch.compile, from one projection."""

import functools

from harness import Case, Cost, main  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit.ops
from effvit.reference.dwconv_glu import dwconv_glu as definition
from effvit.testing.dwconv_glu import NAMES, SPEC

SHAPES = {  # shape of the map, C, gates, k, act, tag; HorNet's gates come first
    "ConvGLU 8x56x56x256 gelu": ((8, 56, 56), 256, 256, 3, "gelu", "default"),
    "ConvGLU 8x28x28x512 gelu": ((8, 28, 28), 512, 512, 3, "gelu", "default"),
    "ConvGLU 8x14x14x512 gelu": ((8, 14, 14), 512, 512, 3, "gelu", "default"),
    "ConvGLU 8x7x7x1024 gelu": ((8, 7, 7), 1024, 1024, 3, "gelu", "default"),
    "ConvGLU 1x28x28x512 gelu": ((1, 28, 28), 512, 512, 3, "gelu", "default"),
    "gnConv 8x56x56x96 7x7": ((8, 56, 56), 96, 32, 7, "none", "default"),
    "gnConv 8x14x14x480 7x7": ((8, 14, 14), 480, 32, 7, "none", "default"),
    "5x5 8x28x28x384 silu": ((8, 28, 28), 384, 384, 5, "silu", "extended"),
    "smoke 2x5x6x8 gelu": ((2, 5, 6), 8, 8, 3, "gelu", "smoke"),
}


def cases():
    for name, (shape, C, G, k, act, tag) in SHAPES.items():
        options = {"act": act, "gate_first": act == "none"}

        def inputs(dtype, device, shape=shape, C=C, G=G, k=k):
            x = torch.randn(*shape, C + G).to(device, dtype)
            weight, bias = (t.to(device, dtype) for t in (torch.randn(C, k, k) / k, torch.randn(C)))
            return {"x": x, "weight": weight, "bias": bias}

        def price(direction, dtype, shape=shape, C=C, G=G, k=k, act=act):
            sizes = ((*shape, C + G), None, (C, k, k), (C,))
            args = tuple(None if s is None else torch.empty(s, dtype=dtype, device="meta") for s in sizes)
            options = {"act": NAMES.index(act), "gate_first": act == "none"}
            calls = [SPEC.cost(args, options, b) for b in (False, True)][: 1 if direction == "forward" else 2]
            return Cost(sum(c.flops for c in calls), sum(c.bytes for c in calls))

        def contender(function, options=options):
            return lambda x, weight, bias: functools.partial(function, x, None, weight, bias, **options)

        yield Case(
            shape=name,
            inputs=inputs,
            effvit=contender(effvit.ops.dwconv_glu),
            peers={"eager": contender(definition)},
            reference=contender(definition),
            cost=price,
            wrt=("x", "weight", "bias"),
            memory=tag == "smoke" or "8x56x56x256" in name,
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("dwconv_glu", cases()))
