"""rnn_scan against its recurrence in eager PyTorch and torch.compile and, at one head, torch.nn.LSTM and GRU."""

import functools

from harness import Case, main, price_of  # first: it pins the threads before torch starts any

# isort: split
import torch

import effvit.ops
from effvit.reference.rnn_scan import CELLS, GATES
from effvit.reference.rnn_scan import rnn_scan as definition
from effvit.testing.rnn_scan import SPEC

SHAPES = {  # (B, L, H, D), cell, tag: a ViT's tokens, rows of a map, a sequence of frames
    "LSTM 8x196 h1 d192": ((8, 196, 1, 192), "lstm", "default"),
    "LSTM 8x196 h6 d64": ((8, 196, 6, 64), "lstm", "default"),
    "GRU 32x49 h1 d128": ((32, 49, 1, 128), "gru", "default"),
    "GRU 8x196 h3 d64": ((8, 196, 3, 64), "gru", "default"),
    "sLSTM 8x196 h4 d48": ((8, 196, 4, 48), "slstm", "default"),
    "sLSTM 32x64 h4 d32": ((32, 64, 4, 32), "slstm", "default"),
    "LSTM 1x784 h4 d64": ((1, 784, 4, 64), "lstm", "extended"),
    "smoke 2x4 h2 d8": ((2, 4, 2, 8), "lstm", "smoke"),
    "smoke 2x4 h1 d8": ((2, 4, 1, 8), "gru", "smoke"),
}


def recurrence(x, weight, *, cell):
    return lambda: definition(x, weight, cell=cell)[0]


def module(x, weight, *, cell):
    """torch's own layer as the scan alone: its input weights are the identity, which costs it a product of its own."""
    B, L, G, _, D = x.shape
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell]
    layer = kind(G * D, D, bias=False, batch_first=True, device=x.device, dtype=x.dtype)
    identity = torch.eye(G * D, dtype=x.dtype, device=x.device)

    def fn():
        parameters = {"weight_ih_l0": identity, "weight_hh_l0": weight.view(G * D, D)}
        return torch.func.functional_call(layer, parameters, (x.view(B, L, G * D),))[0].unflatten(-1, (1, D))

    return fn


def cases():
    for name, ((B, L, H, D), cell, tag) in SHAPES.items():
        G = GATES[cell]

        def inputs(dtype, device, B=B, L=L, G=G, H=H, D=D):
            tensors = {"x": torch.randn(B, L, G, H, D), "weight": torch.randn(H, G, D, D) * (0.5 * D**-0.5)}
            return {n: t.to(device, dtype) for n, t in tensors.items()}

        peers = {"eager": functools.partial(recurrence, cell=cell)}
        if H == 1 and cell != "slstm":
            peers["torch.nn"] = functools.partial(module, cell=cell)
        yield Case(
            shape=name,
            inputs=inputs,
            effvit=lambda x, weight, cell=cell: functools.partial(effvit.ops.rnn_scan, x, weight, cell=cell),
            peers=peers,
            reference=functools.partial(recurrence, cell=cell),
            cost=price_of(SPEC.cost, ((B, L, G, H, D), (H, G, D, D)), cell=CELLS.index(cell)),
            wrt=("x", "weight"),
            compiled="eager" if L <= 64 else None,  # the recurrence unrolled: it compiles for minutes beyond
            memory=tag == "smoke" or "h6" in name,
            tags=(tag,),
        )


if __name__ == "__main__":
    raise SystemExit(main("rnn_scan", cases()))
