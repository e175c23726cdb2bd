"""rnn_scan: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.rnn_scan import CELLS, GATES, STATES
from ..reference.rnn_scan import rnn_scan as _definition
from ._checks import index_of, shape, value_error
from ._op import op


def _derive(op, dims, options, tensors):
    """S states."""
    name = CELLS[options["cell"]]
    if dims["G"] != GATES[name]:
        raise value_error(op, "x", f"[B, L, {GATES[name]}, H, D] for the cell {name}", shape(tensors["x"]))
    dims["S"] = STATES[name]


def _flops(dims, options):
    """The recurrent products: one per step; in the backward three, pre-activations again, states, weights."""
    products = 2 * dims["B"] * dims["L"] * dims["G"] * dims["H"] * dims["D"] ** 2
    return products, 3 * products


OP = op(
    "rnn_scan",
    "x: B L G H D, weight: H G D D, bias?: G H D, initial?: B S H D | float32 packed -> "
    "out: B L H D, trace: B L S H D | float32",
    "cell: int in 0..2 = 0",
    reference=_definition,
    saves="trace",
    limits={"x.D": (1, 1024, "have a head dim between 1 and 1024")},
    derive=_derive,
    empty="B L H",
    shards=("B", "H"),
    flops=_flops,
)


def rnn_scan(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial: torch.Tensor | None = None,
    *,
    cell: str = "lstm",
    return_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""The recurrent part of an LSTM, a GRU or an sLSTM, each head with recurrent weights of its own (FlashRNN).

    What does not depend on the state, x = W input + b, is one large product for all tokens, made outside. Here, token
    after token and head by head, ``rec = weight @ h + bias`` and, with the gates of x and rec:

    - "lstm", gates i, f, g, o of x + rec, states h, c: ``c = sigmoid(f) c + sigmoid(i) tanh(g)``,
      ``h = sigmoid(o) tanh(c)``.
    - "gru", gates r, z, n, state h: ``n = tanh(x_n + r rec_n), h = (1 - z) n + z h``, r and z sigmoids of x + rec.
    - "slstm", gates i, f, z, o, states h, c, n, m:
      ``m' = max(log sigmoid(f) + m, i)``, ``i' = exp(i - m')``,
      ``f' = exp(log sigmoid(f) + m - m')``, ``c = f' c + i' tanh(z), n = f' n + i', h = sigmoid(o) c / n``. m keeps the
      exponentials in range; h does not depend on it.

    The first two are torch.nn.LSTM and torch.nn.GRU at one head.

    Args:
        x: [B, L, G, H, D], G gates of H heads; D from 1 to 1024.
        weight: [H, G, D, D], as h is multiplied: row, then column.
        bias: [G, H, D] or None. For LSTM and sLSTM it may as well be in x; the n gate of the GRU needs it here.
            All float32, bfloat16 or float16 (one dtype), any strides with a last stride of 1.
        initial: [B, S, H, D] float32, the states before the first token. None: zeros; for the sLSTM none at all, so
            that the first token's n is 1. A state given to it must have n > 0.
        cell: "lstm", "gru" or "slstm".
        return_state: also return the states after the last token.

    Returns:
        h [B, L, H, D] in the dtype of x, contiguous; with `return_state` also the states [B, S, H, D] in float32.
        Differentiable in all tensors, through both results: backpropagation through time reads the states of all
        tokens, which are kept in float32, and computes gates again. States and sums are float32 whatever the dtype.
        Deterministic; results do not depend on the number of threads.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; an option has the wrong type.
        ValueError: a shape, stride, device or value is outside the above. The message names the argument.

    Sources: FlashRNN (arXiv:2412.07752), xLSTM (arXiv:2405.04517).
    """
    index = index_of(OP.name, "cell", cell, CELLS)
    out, trace = OP(x, weight, bias, initial, cell=index)
    if not return_state:
        return out
    return out, last_state(trace, initial, cell)


def last_state(trace: torch.Tensor, initial: torch.Tensor | None, cell: str) -> torch.Tensor:
    """The states after the last token, of trace [B, L, S, H, D]; without tokens those that it starts from."""
    if trace.shape[1]:
        return trace[:, -1]
    if initial is not None:
        return initial.clone()
    state = trace.new_zeros(trace.shape[0], *trace.shape[2:])
    if cell == "slstm":
        state[:, 3] = -torch.inf
    return state
