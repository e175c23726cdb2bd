"""block_relu2_attention against its formula in eager PyTorch and torch.compile, and MossFormer's einsums."""

import functools

from harness import Case, main, price_of  # first: it pins the threads before torch starts any

# isort: split
import torch
import torch.nn.functional as F

import effvit.ops
from effvit.reference.block_relu2_attention import block_relu2_attention as definition
from effvit.testing.block_relu2_attention import SPEC

SHAPES = {  # (B, L, K, V), group, tag: MossFormer's [v | u] of 2 s and 4 s, GAU on ViT and on stages of a hierarchy
    "MossFormer 1x4096 k128 v1024": ((1, 4096, 128, 1024), 256, "default"),
    "MossFormer 2x2000 k128 v1024": ((2, 2000, 128, 1024), 256, "default"),
    "GAU 8x196 k64 v384": ((8, 196, 64, 384), 196, "default"),
    "GAU 8x784 k64 v192": ((8, 784, 64, 192), 256, "default"),
    "GAU 2x3136 k32 v96": ((2, 3136, 32, 96), 256, "default"),
    "small groups 8x784 k64 v192": ((8, 784, 64, 192), 49, "extended"),
    "smoke 2x9": ((2, 9, 8, 12), 4, "smoke"),
}


def einsums(q, k, v, group):
    """MossFormer's own code."""

    def fn():
        padded = (F.pad(t, (0, 0, 0, -q.shape[1] % group)).unflatten(1, (-1, group)) for t in (q, k, v))
        qg, kg, vg = padded
        weights = F.relu(torch.einsum("bgid,bgjd->bgij", qg, kg) / group) ** 2
        return torch.einsum("bgij,bgjd->bgid", weights, vg).flatten(1, 2)[:, : q.shape[1]]

    return fn


def cases():
    for name, ((B, L, K, V), group, tag) in SHAPES.items():

        def inputs(dtype, device, B=B, L=L, K=K, V=V, group=group):
            size = (group / K**0.5) ** 0.5
            q, k = (torch.randn(B, L, K) * size for _ in range(2))
            tensors = {"q": q, "k": k, "v": torch.randn(B, L, V)}
            return {n: t.to(device, dtype) for n, t in tensors.items()}

        eager = lambda q, k, v, group=group: functools.partial(definition, q, k, v, group=group)
        yield Case(
            shape=name,
            inputs=inputs,
            effvit=lambda q, k, v, group=group: functools.partial(
                effvit.ops.block_relu2_attention, q, k, v, group=group
            ),
            peers={"eager": eager, "einsum": functools.partial(einsums, group=group)},
            reference=eager,
            cost=price_of(SPEC.cost, ((B, L, K), (B, L, K), (B, L, V)), group=group),
            wrt=("q", "k", "v"),
            memory=tag == "smoke" or "1x4096" in name,
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("block_relu2_attention", cases()))
