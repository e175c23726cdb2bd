"""rbf_gram against its formula in eager PyTorch and torch.compile, SOFT's own code, and torch.cdist."""

import functools

from harness import Case, Cost, main  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit.ops
from effvit.reference.rbf_gram import rbf_gram as definition
from effvit.testing.rbf_gram import SPEC

SHAPES = {  # (B, L, M, H, D), tag: SOFT's stages at 224 x 224, and the Gram matrix of the bottleneck tokens
    "SOFT stage 1 8x3136x49 h1": ((8, 3136, 49, 1, 64), "default"),
    "SOFT stage 2 8x784x49 h2": ((8, 784, 49, 2, 64), "default"),
    "SOFT stage 3 8x196x49 h5": ((8, 196, 49, 5, 64), "default"),
    "SOFT bottleneck 8x49x49 h8": ((8, 49, 49, 8, 64), "default"),
    "SOFT/384 stage 1 2x9216x144 h1": ((2, 9216, 144, 1, 64), "extended"),
    "SOFT stage 1 d32 8x3136x49 h2": ((8, 3136, 49, 2, 32), "extended"),
    "smoke 2x9x5 h2": ((2, 9, 5, 2, 8), "smoke"),
}


def soft(q, k):
    """SOFT's subtraction_gaussian_kernel_torch: the norms are products with matrices of ones."""
    q, k = q.transpose(1, 2), k.transpose(1, 2).mT
    q_ones, k_ones = (torch.ones(t.shape[-2:], dtype=t.dtype, device=t.device) for t in (k, q))

    def fn():
        return torch.exp(-0.5 * (q.square() @ q_ones + k_ones @ k.square() - 2 * (q @ k)))

    return fn


def cdist(q, k):
    """torch.cdist takes float32 only."""

    def fn():
        distance = torch.cdist(*(t.float().transpose(1, 2) for t in (q, k)))
        return torch.exp(-0.5 * distance.square()).to(q.dtype)

    return fn


def cases():
    for name, (shape, tag) in SHAPES.items():
        B, L, M, H, D = shape

        def inputs(dtype, device, B=B, L=L, M=M, H=H, D=D):
            q, k = (torch.randn(B, n, H, D) * D**-0.25 for n in (L, M))
            return {"q": q.to(device, dtype), "k": k.to(device, dtype)}

        def price(direction, dtype, B=B, L=L, M=M, H=H, D=D):
            args = tuple(torch.empty(B, n, H, D, dtype=dtype, device="meta") for n in (L, M))
            calls = [SPEC.cost(args, {}, backward) for backward in (False, True)][: 1 if direction == "forward" else 2]
            return Cost(sum(c.flops for c in calls), sum(c.bytes for c in calls))

        yield Case(
            shape=name,
            inputs=inputs,
            effvit=lambda q, k: functools.partial(effvit.ops.rbf_gram, q, k),
            peers={"eager": lambda q, k: functools.partial(definition, q, k), "soft": soft, "cdist": cdist},
            reference=lambda q, k: functools.partial(definition, q, k),
            cost=price,
            wrt=("q", "k"),
            memory=tag == "smoke" or "stage 1 8x" in name,
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("rbf_gram", cases()))
