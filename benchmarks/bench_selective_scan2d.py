"""selective_scan2d against its definition, the recurrence with a compiled step, and a two-level scan by chunks.

PyTorch has no selective scan. The peers copy the map into four sequences, as VMamba's own code does:
- eager: the definition; all decays at once, then a multiply-add per token;
- recurrence: a compiled step per token, which makes the token's decays itself;
- chunked: chunks of about the root of L tokens side by side, then their states one after another; compiled as well.
To compile the whole recurrence takes longer than an hour at these lengths.
"""

import functools
import math

from harness import Case, Cost, main  # first: it pins the threads before torch starts any

# isort: split
import torch
import torch.nn.functional as F

import effvit.ops
from effvit.reference.selective_scan2d import cross_merge, cross_scan
from effvit.reference.selective_scan2d import selective_scan2d as definition
from effvit.testing.selective_scan2d import SPEC

SHAPES = {  # (B, H, W, D, N), tag: maps of VMamba at 224 x 224; 16 states until its v05, one since
    "1x56x56x96 n16": ((1, 56, 56, 96, 16), "default"),
    "1x56x56x96 n1": ((1, 56, 56, 96, 1), "default"),
    "1x28x28x192 n16": ((1, 28, 28, 192, 16), "default"),
    "1x28x28x192 n1": ((1, 28, 28, 192, 1), "default"),
    "1x14x14x384 n16": ((1, 14, 14, 384, 16), "default"),
    "1x14x14x384 n1": ((1, 14, 14, 384, 1), "default"),
    "8x28x28x192 n1": ((8, 28, 28, 192, 1), "extended"),
    "8x14x14x384 n1": ((8, 14, 14, 384, 1), "extended"),
    "smoke 2x3x4x5 n2": ((2, 3, 4, 5, 2), "smoke"),
}
NAMES = SPEC.tensors


def prepared(x, dt, b, c, d, dt_bias):
    """u, delta [B, L, 4, D], b and c [B, L, 4, N], in float32."""
    x, dt, b, c = (t.float() for t in (x, dt, b, c))
    u = cross_scan(x.unsqueeze(3).expand(*x.shape[:3], 4, x.shape[3]))
    return u, F.softplus(cross_scan(dt) + dt_bias), cross_scan(b), cross_scan(c)


def step(h, u, delta, b, c, a):
    h = (delta.unsqueeze(-1) * a).exp() * h + (delta * u).unsqueeze(-1) * b.unsqueeze(2)
    return h, (h * c.unsqueeze(2)).sum(-1)


def recurrence(x, dt, b, c, a, d, dt_bias):
    one = torch.compile(step, fullgraph=True, dynamic=False)

    def fn():
        u, *rest = prepared(x, dt, b, c, d, dt_bias)
        h, ys = u.new_zeros(u.shape[0], *a.shape), []
        for token in zip(*(t.unbind(1) for t in (u, *rest)), strict=True):
            h, y = one(h, *token, a)
            ys.append(y)
        return cross_merge(torch.stack(ys, 1) + d * u, *x.shape[1:3])

    return fn


def chunked(x, dt, b, c, a, d, dt_bias):
    L = x.shape[1] * x.shape[2]
    size = next(n for n in range(math.isqrt(L), 0, -1) if L % n == 0)

    def fn():
        u, delta, bs, cs = (t.unflatten(1, (-1, size)) for t in prepared(x, dt, b, c, d, dt_bias))
        decay = (delta.unsqueeze(-1) * a).exp()  # [B, chunks, size, 4, D, N]
        added = (delta * u).unsqueeze(-1) * bs.unsqueeze(4)
        within, product = [], []  # states and decays since the start of the chunk
        for e, new in zip(decay.unbind(2), added.unbind(2), strict=True):
            within.append(e * within[-1] + new if within else new)
            product.append(e * product[-1] if product else e)
        starts = [torch.zeros_like(within[-1][:, 0])]
        for e, new in zip(product[-1].unbind(1)[:-1], within[-1].unbind(1), strict=False):
            starts.append(e * starts[-1] + new)
        h = torch.stack(within, 2) + torch.stack(product, 2) * torch.stack(starts, 1).unsqueeze(2)
        y = (h * cs.unsqueeze(4)).sum(-1) + d * u
        return cross_merge(y.flatten(1, 2), *x.shape[1:3])

    return fn


def cases():
    for name, ((B, H, W, D, N), tag) in SHAPES.items():
        shapes = {"x": (B, H, W, D), "dt": (B, H, W, 4, D), "b": (B, H, W, 4, N), "c": (B, H, W, 4, N)}
        shapes |= {"a": (4, D, N), "d": (4, D), "dt_bias": (4, D)}

        def inputs(dtype, device, shapes=shapes, N=N):
            drawn = {n: torch.randn(shape).to(device, dtype if n in ("x", "dt", "b", "c") else torch.float32)
                     for n, shape in shapes.items()}  # fmt: skip
            drawn["a"] = -torch.arange(1.0, N + 1, device=device).expand(shapes["a"]).contiguous()
            drawn["dt_bias"] -= 4
            return drawn

        def price(direction, dtype, shapes=shapes):
            kinds = (dtype,) * 4 + (torch.float32,) * 3
            args = tuple(torch.empty(shapes[n], dtype=k, device="meta") for n, k in zip(NAMES, kinds, strict=True))
            calls = [SPEC.cost(args, {}, backward) for backward in (False, True)][: 1 if direction == "forward" else 2]
            return Cost(sum(c.flops for c in calls), sum(c.bytes for c in calls))

        yield Case(
            shape=name,
            inputs=inputs,
            effvit=lambda **t: functools.partial(effvit.ops.selective_scan2d, **t),
            peers={
                "eager": lambda **t: functools.partial(definition, **t), "recurrence": recurrence, "chunked": chunked,
            },
            reference=lambda **t: functools.partial(definition, **t),
            compiled="chunked",
            cost=price,
            wrt=NAMES,
            memory=tag == "smoke" or name == "1x56x56x96 n16",
            tags=(tag,),
        )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main("selective_scan2d", cases()))
