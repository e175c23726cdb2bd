"""aft against its factored formula in eager PyTorch and torch.compile, and against the stable one."""

import functools

from harness import Case, main, price_of  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit.ops
from effvit.reference.aft import aft as definition
from effvit.testing.aft import SPEC

SHAPES = {  # (B, L, C), bias, window, tag: full and local on ViT and on stages of a hierarchy, simple
    "AFT-full 8x196x384": ((8, 196, 384), True, 0, "default"),
    "AFT-full 2x784x192": ((2, 784, 192), True, 0, "default"),
    "AFT-local 8x196x384 w32": ((8, 196, 384), True, 32, "default"),
    "AFT-simple 8x196x384": ((8, 196, 384), False, 0, "default"),
    "AFT-simple 8x3136x96": ((8, 3136, 96), False, 0, "default"),
    "AFT-full 1x3136x96": ((1, 3136, 96), True, 0, "extended"),
    "smoke 2x9x12": ((2, 9, 12), True, 3, "smoke"),
    "smoke simple 2x9x12": ((2, 9, 12), False, 0, "smoke"),
}


def factored(q, k, v, bias=None, *, window):
    """The paper's appendix: exp(w) exp(k) as two products, the largest of each taken off. Not stable for all inputs."""
    L, M = q.shape[1], k.shape[1]
    index = torch.arange(max(L, M), device=q.device)
    near = (index[:L, None] - index[:M]).abs() < window

    def fn():
        e = torch.exp(k - k.amax(1, keepdim=True))
        if bias is None:
            return torch.sigmoid(q) * (e * v).sum(1, keepdim=True) / e.sum(1, keepdim=True)
        w = torch.where(near, bias, 0) if window else bias
        w = torch.exp(w - w.amax(1, keepdim=True))
        return torch.sigmoid(q) * (w @ (e * v)) / (w @ e)

    return fn


def stable(q, k, v, bias=None, *, window):
    return lambda: definition(q, k, v, bias, window=window)[0]


def cases():
    for name, ((B, L, C), biased, window, tag) in SHAPES.items():

        def inputs(dtype, device, B=B, L=L, C=C, biased=biased):
            tensors = {n: torch.randn(B, L, C) for n in "qkv"}
            tensors |= {"bias": torch.randn(L, L)} if biased else {}
            return {n: t.to(device, dtype) for n, t in tensors.items()}

        fits = B * L * L * C < 2e7  # [B, L, L, C] in float64, and in gradients
        shapes = [(B, L, C)] * 3 + ([(L, L)] if biased else [])
        yield Case(
            shape=name,
            inputs=inputs,
            effvit=lambda window=window, **t: functools.partial(effvit.ops.aft, **t, window=window),
            peers={"eager": functools.partial(factored, window=window)}
            | ({"stable": functools.partial(stable, window=window)} if fits or not biased else {}),
            reference=functools.partial(factored, window=window),
            cost=price_of(SPEC.cost, shapes, window=window),
            wrt=("q", "k", "v", "bias") if biased else ("q", "k", "v"),
            memory=tag == "smoke" or "full 8x" in name,
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("aft", cases()))
