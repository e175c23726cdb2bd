"""local_pool_attention against its formula, eager and compiled, and the order of TransNeXt's own code, by unfold."""

import functools

from harness import Case, Cost, main  # first: it pins the threads before torch starts any

# isort: split
import torch
import torch.nn.functional as F

import effvit.ops
from effvit.reference.local_pool_attention import local_pool_attention as definition
from effvit.testing.local_pool_attention import EXTRAS, SPEC

SHAPES = {  # (B, H, W, h, d, P, window), tag: TransNeXt-Tiny's stages at 224 x 224
    "TransNeXt stage 1 8x56x56 h3 d24": ((8, 56, 56, 3, 24, 49, 3), "default"),
    "TransNeXt stage 2 8x28x28 h6 d24": ((8, 28, 28, 6, 24, 49, 3), "default"),
    "TransNeXt stage 3 8x14x14 h12 d24": ((8, 14, 14, 12, 24, 49, 3), "default"),
    "TransNeXt stage 1 1x56x56 h3 d24": ((1, 56, 56, 3, 24, 49, 3), "default"),
    "window 5 8x28x28 h6 d32": ((8, 28, 28, 6, 32, 49, 5), "extended"),
    "smoke 2x4x5 h2": ((2, 4, 5, 2, 8, 4, 3), "smoke"),
}


def shapes_of(B, H, W, h, d, P, window):
    """{tensor: shape}"""
    T = window * window
    maps, pooled = dict.fromkeys(("q", "k", "v"), (B, H, W, h, d)), dict.fromkeys(("k_pool", "v_pool"), (B, P, h, d))
    optional = ((h, T), (h, H * W, P), (h, H * W), (h, d), (h, d, T), (h, T))
    return maps | pooled | dict(zip(EXTRAS, optional, strict=True))


def unfolded(window, q, k, v, k_pool, v_pool, local_bias, pool_bias, q_scale, q_embed, tokens, token_bias):
    """The order of TransNeXt's code: heads first, keys and values of all windows written down."""
    B, H, W, h, d = q.shape
    N, T = H * W, window * window
    outside = F.unfold(torch.ones(1, 1, H, W), window, padding=window // 2).squeeze(0).T == 0

    def windows(t):  # [B, h, N, d, T]
        t = F.unfold(t.permute(0, 3, 4, 1, 2).reshape(B, h * d, H, W), window, padding=window // 2)
        return t.view(B, h, d, T, N).permute(0, 1, 4, 2, 3)

    def fn():
        heads = lambda t: t.reshape(B, -1, h, d).transpose(1, 2)
        given, dtype = heads(q), q.dtype
        s = (given + q_embed[:, None].to(dtype)) * q_scale[..., None].to(dtype)
        local = (s.unsqueeze(-2) @ windows(k)).squeeze(-2) + local_bias[:, None].to(dtype)
        pooled = s @ heads(k_pool).mT + pool_bias.to(dtype)
        weights = torch.cat((local.masked_fill(outside, -torch.inf), pooled), -1).softmax(-1)
        a, b = weights.split((T, pooled.shape[-1]), -1)
        a = a + given @ tokens.to(dtype) + token_bias[:, None].to(dtype)
        out = (a.unsqueeze(-2) @ windows(v).mT).squeeze(-2) + b @ heads(v_pool)
        return out.transpose(1, 2).reshape(B, H, W, h, d)

    return fn


def cases():
    for name, (sizes, tag) in SHAPES.items():
        shapes, window = shapes_of(*sizes), sizes[-1]

        def inputs(dtype, device, shapes=shapes, d=sizes[4]):
            made = {n: torch.randn(shape) for n, shape in shapes.items()}
            made["q_scale"] = made["q_scale"].abs()
            for n in ("q", "k", "k_pool", "tokens"):
                made[n] *= d**-0.25
            maps = ("q", "k", "v", "k_pool", "v_pool")
            half = torch.float64 if dtype == torch.float64 else torch.float32
            return {n: t.to(device, dtype if n in maps else half) for n, t in made.items()}

        def price(direction, dtype, shapes=shapes, window=window):
            args = tuple(
                torch.empty(s, dtype=torch.float32 if n in EXTRAS else dtype, device="meta") for n, s in shapes.items()
            )
            calls = [SPEC.cost(args, {"window": window}, b) for b in (False, True)]
            calls = calls[: 1 if direction == "forward" else 2]
            return Cost(sum(c.flops for c in calls), sum(c.bytes for c in calls))

        def contender(function, window=window):
            return lambda **tensors: functools.partial(function, *tensors.values(), window=window)

        yield Case(
            shape=name,
            inputs=inputs,
            effvit=contender(effvit.ops.local_pool_attention),
            peers={
                "eager": contender(definition),
                "unfold": lambda window=window, **tensors: unfolded(window, **tensors),
            },
            reference=contender(definition),
            cost=price,
            wrt=tuple(shapes),
            memory=tag == "smoke" or "stage 1 8x" in name,
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("local_pool_attention", cases()))
