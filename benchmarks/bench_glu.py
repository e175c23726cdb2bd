"""glu against its formula in eager PyTorch and torch.compile, and torch's own glu, from one projection."""

import functools

from harness import Case, main, price_of  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit.ops
from effvit.reference.glu import glu as definition
from effvit.testing.glu import NAMES, SPEC

SHAPES = {  # shape of the projection [..., 2C], act, tag
    "ConvGLU 8x56x56x170 gelu": ((8, 56, 56, 340), "gelu", "default"),
    "ConvGLU 8x14x14x680 gelu": ((8, 14, 14, 1360), "gelu", "default"),
    "VMamba gate 8x28x28x384 silu": ((8, 28, 28, 768), "silu", "default"),
    "SwiGLU ViT-B 8x197x2048 silu": ((8, 197, 4096), "silu", "default"),
    "GLU 8x196x512 sigmoid": ((8, 196, 1024), "sigmoid", "default"),
    "ReGLU 8x196x512 relu": ((8, 196, 1024), "relu", "extended"),
    "tanh 8x196x512": ((8, 196, 1024), "tanh", "extended"),
    "smoke 2x3x6 gelu": ((2, 3, 12), "gelu", "smoke"),
}


def torchs(act):
    """torch.nn.functional.glu knows the sigmoid alone."""
    return {"F.glu": lambda x: functools.partial(torch.nn.functional.glu, x)} if act == "sigmoid" else {}


def cases():
    for name, (shape, act, tag) in SHAPES.items():
        yield Case(
            shape=name,
            inputs=lambda dtype, device, shape=shape: {"x": torch.randn(shape).to(device, dtype)},
            effvit=lambda x, act=act: functools.partial(effvit.ops.glu, x, act=act),
            peers={"eager": lambda x, act=act: functools.partial(definition, x, act=act), **torchs(act)},
            reference=lambda x, act=act: functools.partial(definition, x, act=act),
            cost=price_of(SPEC.cost, [shape], act=NAMES.index(act)),
            wrt=("x",),
            memory=tag == "smoke" or "56x56" in name,
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("glu", cases()))
