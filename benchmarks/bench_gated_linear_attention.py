"""gated_linear_attention against the chunkwise formula, eager and under torch.compile, and the recurrence compiled.

q, k and v are views of one projection [B, L, 3, H, D], as in the models. The peers' chunkwise form is the fast one: all
chunks at once, channels' decays as (q e^b)(k e^-b)^T, which overflows under strong gates; those here are mild.
"""

import dataclasses
import sys

from harness import Case, main, price_of  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit.ops
from effvit.reference.gated_linear_attention import gated_linear_attention as definition
from effvit.testing.gated_linear_attention import SPEC

F = torch.nn.functional
CHUNK = 64
RECURRENT_TOKENS = 800  # a call of a compiled step for every token: beyond it, seconds
COMPILES = "--no-compile" not in sys.argv


@dataclasses.dataclass(frozen=True)
class Shape:
    """Geometry and options of one case; C = H * D."""

    B: int
    L: int
    H: int
    D: int
    gate: str = "token"
    bidirectional: bool = False
    tags: tuple = ("default",)
    memory: bool = False

    @property
    def title(self):
        both = " both ways" if self.bidirectional else ""
        return f"{self.gate}{both} {self.B}x{self.L}x{self.H * self.D} d{self.D}"

    def price(self):
        tokens = [(self.B, self.L, self.H, self.D)] * 3
        gates = {"head": (self.H,), "token": (self.B, self.L, self.H), "channel": (self.B, self.L, self.H, self.D)}

        def cost(args, kwargs, backward):
            *qkv, g = args
            g = g.float()
            given = (g if name == self.gate else None for name in gates)
            return SPEC.cost((*qkv, *given), kwargs, backward)

        return price_of(cost, [*tokens, gates[self.gate]], direction=2 if self.bidirectional else 0)


SHAPES = [
    Shape(1, 196, 4, 32),
    Shape(8, 196, 12, 64),
    Shape(1, 1024, 6, 64, memory=True),
    Shape(1, 4096, 12, 32),
    Shape(1, 4096, 6, 64),
    Shape(1, 196, 4, 64, "channel"),
    Shape(8, 196, 6, 32, "channel"),
    Shape(1, 1024, 4, 64, "channel"),
    Shape(1, 4096, 12, 32, "channel"),
    Shape(8, 196, 6, 64, "head"),
    Shape(1, 3136, 4, 64, "head"),
    Shape(8, 196, 12, 32, "head", bidirectional=True),
    Shape(1, 1024, 6, 64, "token", bidirectional=True),
    Shape(1, 16384, 4, 32, tags=("extended",)),
    Shape(8, 784, 12, 64, "channel", tags=("extended",)),
    Shape(1, 70, 2, 16, tags=("smoke",), memory=True),
    Shape(1, 70, 2, 16, "channel", tags=("smoke",)),
    Shape(1, 70, 2, 16, "head", bidirectional=True, tags=("smoke",)),
]


def inputs_of(shape):
    def draw(dtype, device):
        B, L, H, D = shape.B, shape.L, shape.H, shape.D
        drawn = dict(zip("qkv", torch.randn(B, L, 3, H, D).to(device, dtype).unbind(2), strict=True))
        if shape.gate == "head":
            g = torch.log1p(-(2.0 ** (-5 - torch.arange(H))))
        else:
            g = F.logsigmoid(torch.randn(B, L, H, *((D,) if shape.gate == "channel" else ()))) / 16
        return drawn | {"g": g.to(device)}

    return draw


def effvit_path(shape):
    def make(q, k, v, g):
        return lambda: effvit.ops.gated_linear_attention(q, k, v, g, bidirectional=shape.bidirectional)

    return make


def reference_path(shape):
    """The definition, in the dtype of its inputs (the harness passes float64)."""

    def make(q, k, v, g):
        gate, direction = {f"g_{shape.gate}": g}, 2 if shape.bidirectional else 0
        return lambda: definition(q, k, v, **gate, scale=shape.D**-0.5, direction=direction)[0]

    return make


def magnitudes(shape):
    def of(inputs, grad_out, eps):
        q, k, v, g = (t.detach() for t in inputs.values())
        gates = (g if name == shape.gate else None for name in ("head", "token", "channel"))
        options = {"scale": shape.D**-0.5, "direction": 2 if shape.bidirectional else 0}
        grads = None if grad_out is None else (grad_out, None)
        outputs, gradients = SPEC.magnitudes((q, k, v, *gates), options, grads, eps)
        return {"out": outputs["out"]} | {"d" + name[:1]: m for name, m in gradients.items()}

    return of


# ---- peers ---------------------------------------------------------------------------------------------------------


def both_ways(shape, walk):
    """walk(q, k, v, g): forward; of both directions, the sum without the own token once."""

    def run(q, k, v, g):
        out = walk(q, k, v, g)
        if not shape.bidirectional:
            return out
        flipped = walk(*(t.flip(1) for t in (q, k, v)), g if g.dim() == 1 else g.flip(1)).flip(1)
        return out + flipped - shape.D**-0.5 * (q * k).sum(-1, keepdim=True) * v

    return run


def by_chunks(q, k, v, g):
    """All chunks in batched products, then the states from chunk to chunk."""
    B, L, H, D = q.shape
    n = -(-L // CHUNK)
    g = g.expand(B, L, H) if g.dim() == 1 else g

    def chunks(t):  # [B, H, n, CHUNK, ...]
        t = F.pad(t, (*(0, 0) * (t.dim() - 2), 0, n * CHUNK - L))
        return t.unflatten(1, (n, CHUNK)).movedim(3, 1)

    cq, ck, cv, cg = chunks(q * D**-0.5), chunks(k), chunks(v), chunks(g)
    b = cg.cumsum(3)
    last = b[:, :, :, -1:]
    kind = q.dtype
    if g.dim() == 4:
        start, to_end, total = b.exp(), (last - b).exp(), last.exp()
        near = cq * start.to(kind)
        scores = (near @ (ck * (-b).exp().to(kind)).mT).tril()
        keys = ck * to_end.to(kind)
        factors = total.squeeze(3)[..., None]
    else:
        start, to_end = b.exp()[..., None], (last - b).exp()[..., None]
        near = cq * start.to(kind)
        decay = (b[..., :, None] - b[..., None, :]).tril().exp().tril()
        scores = (cq @ ck.mT) * decay.to(kind)
        keys = ck * to_end.to(kind)
        factors = last.exp()[..., None]
    updates = (keys.mT @ cv).to(b.dtype)
    state, states = torch.zeros_like(updates[:, :, 0]), []
    for i in range(n):
        states.append(state)
        state = factors[:, :, i] * state + updates[:, :, i]
    out = scores @ cv + near @ torch.stack(states, 2).to(kind)
    return out.movedim(1, 3).flatten(1, 2)[:, :L]


def chunk_path(shape):
    run = both_ways(shape, by_chunks)

    def make(q, k, v, g):
        return lambda: run(q, k, v, g)

    return make


def _step(state, q, k, v, decay):
    state = decay * state + k[..., None] * v[..., None, :]
    return state, (q[..., None, :] @ state).squeeze(-2)


def recurrence_path(shape):
    """Token by token, in float32, the step compiled."""
    step = torch.compile(_step, fullgraph=True, dynamic=False) if COMPILES else _step

    def walk(q, k, v, g):
        B, L, H, D = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        decay = g.to(wide).exp()[..., None] if g.dim() == 4 else g.to(wide).exp()[..., None, None]
        factors = decay.unbind(1) if g.dim() > 1 else [decay] * L
        tokens = zip(*(t.to(wide).unbind(1) for t in (q * D**-0.5, k, v)), factors, strict=True)
        state, outs = torch.zeros(B, H, D, D, dtype=wide), []
        for token in tokens:
            state, out = step(state, *token)
            outs.append(out)
        return torch.stack(outs, 1).to(q.dtype)

    run = both_ways(shape, walk)

    def make(q, k, v, g):
        return lambda: run(q, k, v, g)

    return make


def cases():
    for shape in SHAPES:
        peers = {"eager": chunk_path(shape)}
        if shape.L <= RECURRENT_TOKENS:
            peers["recurrence"] = recurrence_path(shape)
        yield Case(
            shape=shape.title,
            inputs=inputs_of(shape),
            effvit=effvit_path(shape),
            peers=peers,
            reference=reference_path(shape),
            cost=shape.price(),
            magnitudes=magnitudes(shape),
            wrt=("q", "k", "v", "g"),
            memory=shape.memory,
            tags=shape.tags,
        )


if __name__ == "__main__":
    raise SystemExit(main("gated_linear_attention", cases()))
