"""rnn_scan in readable PyTorch: the definition."""

import torch
import torch.nn.functional as F

CELLS = ("lstm", "gru", "slstm")
GATES = {"lstm": 4, "gru": 3, "slstm": 4}
STATES = {"lstm": 2, "gru": 1, "slstm": 4}


def _lstm(x, rec, h, c):
    """Gates i, f, g, o, as in torch.nn.LSTM."""
    i, f, g, o = (x + rec).unbind(1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(x, rec, h):
    """Gates r, z, n, as in torch.nn.GRU: the reset gate applies to the recurrent part, its bias included."""
    r, z = torch.sigmoid(x[:, :2] + rec[:, :2]).unbind(1)
    n = torch.tanh(x[:, 2] + r * rec[:, 2])
    return ((1 - z) * n + z * h,)


def _slstm(x, rec, h, c, n, m):
    """Gates i, f, z, o of xLSTM: exponential input gate, sigmoid forget gate; c and n are divided by exp(m)."""
    i, f, z, o = (x + rec).unbind(1)
    kept = F.logsigmoid(f) + m
    top = torch.where(kept > i, kept, i)
    i, f = torch.exp(i - top), torch.exp(kept - top)
    c = f * c + i * torch.tanh(z)
    n = f * n + i
    return torch.sigmoid(o) * c / n, c, n, top


_STEPS = (_lstm, _gru, _slstm)


def rnn_scan(x, weight, bias=None, initial=None, *, cell="lstm"):
    """h_t, states_t = cell(x_t, R h_(t-1) + bias, states_(t-1)) for t = 1..L, each head with an R of its own.

    x [B, L, G, H, D], weight [H, G, D, D] (gate, row, column), bias [G, H, D], initial [B, S, H, D]: states h and c, or
    h, or h, c, n, m; zeros (m: -inf) where None. Returns h [B, L, H, D] and all states [B, L, S, H, D].
    """
    name = cell if isinstance(cell, str) else CELLS[cell]
    B, L, _, H, D = x.shape
    if initial is None:
        states = [x.new_zeros(B, H, D) for _ in range(STATES[name])]
        if name == "slstm":
            states[3] = torch.full_like(states[3], -torch.inf)
    else:
        states = initial.to(x.dtype).unbind(1)
    trace = []
    for t in range(L):
        rec = torch.einsum("bhi,hgoi->bgho", states[0], weight)
        rec = rec if bias is None else rec + bias
        states = _STEPS[CELLS.index(name)](x[:, t], rec, *states)
        trace.append(torch.stack(states, dim=1))
    trace = torch.stack(trace, dim=1) if trace else x[:, :, :1].expand(-1, -1, STATES[name], -1, -1)
    return trace[:, :, 0], trace
