"""gated_linear_attention_step against its formula in eager PyTorch and torch.compile: decoding, one token at a time."""

import dataclasses

from harness import Case, main, price_of  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit.ops
from effvit.reference.gated_linear_attention_step import gated_linear_attention_step as definition
from effvit.testing.gated_linear_attention_step import SPEC


@dataclasses.dataclass(frozen=True)
class Shape:
    """Geometry of one case; the gates are per token and head, or per channel."""

    B: int
    H: int
    D: int
    gate: str = "channel"
    tags: tuple = ("default",)

    @property
    def title(self):
        return f"{self.gate} {self.B}x{self.H}x{self.D}"

    def price(self):
        B, H, D = self.B, self.H, self.D

        def cost(args, kwargs, backward):
            q, k, v, state, g = args
            gates = (None, g.float()) if self.gate == "token" else (None, None, g.float())
            return SPEC.cost((q, k, v, state.float(), *gates), kwargs, False)

        gate = (B, H, D) if self.gate == "channel" else (B, H)
        return price_of(cost, [*((B, H, D),) * 3, (B, H, D, D), gate])


SHAPES = [
    Shape(1, 4, 64),
    Shape(8, 12, 64, "token"),
    Shape(32, 8, 64),
    Shape(16, 4, 128),
    Shape(2, 2, 16, tags=("smoke",)),
]


def inputs_of(shape):
    def draw(dtype, device):
        B, H, D = shape.B, shape.H, shape.D
        drawn = {n: torch.randn(B, H, D).to(device, dtype) for n in "qkv"}
        g = -torch.rand(B, H, D) if shape.gate == "channel" else -torch.rand(B, H)
        return drawn | {"g": g.to(device), "state": torch.randn(B, H, D, D, device=device)}

    return draw


def effvit_path(shape):
    def make(q, k, v, g, state):
        return lambda: effvit.ops.gated_linear_attention_step(q, k, v, g, state)[0]

    return make


def formula_path(shape, wide=False):
    """In float32, as the states are; the definition, in the dtype of its inputs."""

    def make(q, k, v, g, state):
        gate, scale = {f"g_{shape.gate}": g}, shape.D**-0.5

        def fn():
            tokens = (q, k, v) if wide else (t.float() for t in (q, k, v))
            return definition(*tokens, state, **gate, scale=scale)[0].to(q.dtype)

        return fn

    return make


def cases():
    for shape in SHAPES:
        yield Case(
            shape=shape.title,
            inputs=inputs_of(shape),
            effvit=effvit_path(shape),
            peers={"eager": formula_path(shape)},
            reference=formula_path(shape, wide=True),
            cost=shape.price(),
            directions=("forward",),
            tags=shape.tags,
        )


if __name__ == "__main__":
    raise SystemExit(main("gated_linear_attention_step", cases()))
