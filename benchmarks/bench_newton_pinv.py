"""newton_pinv against its 20 steps in eager PyTorch and torch.compile, and torch.linalg.inv.

How many steps a matrix needs depends on it: random tokens have a Gram matrix near the identity, close ones need all 20.
"""

import functools

from harness import Case, Cost, main  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit.ops
from effvit.reference.newton_pinv import newton_pinv as definition
from effvit.testing.newton_pinv import SPEC, gram

SHAPES = {  # (B, H, m), distance of the tokens, tag
    "8 matrices 49x49, close tokens": ((8, 1, 49), 0.35, "default"),
    "64 matrices 49x49, close tokens": ((8, 8, 49), 0.35, "default"),
    "8 matrices 49x49, random tokens": ((8, 1, 49), 1.0, "default"),
    "64 matrices 49x49, random tokens": ((8, 8, 49), 1.0, "default"),
    "16 matrices 144x144, close tokens": ((8, 2, 144), 0.35, "extended"),
    "2 matrices 256x256, close tokens": ((2, 1, 256), 0.35, "extended"),
    "smoke 2 matrices 9x9": ((1, 2, 9), 1.0, "smoke"),
}


def exact(a):
    """An LU decomposition, in float32 only; it does not damp small eigenvalues as 20 steps do."""
    ridge = 0.01 * torch.eye(a.shape[-1], dtype=torch.float32, device=a.device)
    return lambda: torch.linalg.inv(a.float() + ridge).to(a.dtype)


def cases():
    for name, ((B, H, m), spread, tag) in SHAPES.items():

        def inputs(dtype, device, B=B, H=H, m=m, spread=spread):
            a = gram(B, H, m, torch.Generator().manual_seed(0), spread=spread)
            return {"a": a.to(device, dtype)}

        def price(direction, dtype, B=B, H=H, m=m):
            args = (torch.empty(B, H, m, m, dtype=dtype, device="meta"),)
            calls = [SPEC.cost(args, {}, backward) for backward in (False, True)][: 1 if direction == "forward" else 2]
            return Cost(sum(c.flops for c in calls), sum(c.bytes for c in calls))

        yield Case(
            shape=name,
            inputs=inputs,
            effvit=lambda a: functools.partial(effvit.ops.newton_pinv, a),
            peers={"eager": lambda a: functools.partial(definition, a), "linalg.inv": exact},
            reference=lambda a: functools.partial(definition, a),
            cost=price,
            wrt=("a",),
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("newton_pinv", cases()))
