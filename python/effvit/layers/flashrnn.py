"""FlashRNN's layers: LSTM, GRU and sLSTM with recurrent weights for each head."""

import torch
from torch import nn

from ..reference.rnn_scan import GATES, STATES
from ._ops import rnn_scan
from ._tokens import head_dim


class _HeadwiseRNN(nn.Module):
    """x [B, L, input_size], state or None -> (h [B, L, hidden_size], state [B, S, num_heads, hidden_size / num_heads]).

    The state is float32 whatever the dtype, and goes into the next call.
    """

    cell = ""
    has_recurrent_bias = False

    def __init__(self, input_size, hidden_size, num_heads=1, bias=True, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        if num_heads < 1 or hidden_size < 1 or hidden_size % num_heads:
            raise ValueError(
                f"effvit::{type(self).__name__}: hidden_size must be a multiple of num_heads {num_heads}, "
                f"got {hidden_size}"
            )
        D, gates = head_dim(self, hidden_size, num_heads), GATES[self.cell]
        self.input = nn.Linear(input_size, gates * hidden_size, bias=bias, **factory)
        self.recurrent = nn.Parameter(torch.empty(num_heads, gates, D, D, **factory))
        self.recurrent_bias = None
        if bias and self.has_recurrent_bias:
            self.recurrent_bias = nn.Parameter(torch.empty(gates, num_heads, D, **factory))
        for p in self.parameters():  # as torch.nn.LSTM, with the fan of a head
            nn.init.uniform_(p, -(D**-0.5), D**-0.5)

    def forward(self, x, state=None):
        gates, S, D = GATES[self.cell], STATES[self.cell], self.hidden_size // self.num_heads
        if state is not None and tuple(state.shape) != (x.shape[0], S, self.num_heads, D):
            raise ValueError(
                f"effvit::{type(self).__name__}: state must be {[x.shape[0], S, self.num_heads, D]}, "
                f"got {list(state.shape)}"
            )
        pre = self.input(x).unflatten(-1, (gates, self.num_heads, D))
        weight, bias = self.recurrent, self.recurrent_bias
        weight, bias = weight.to(pre.dtype), None if bias is None else bias.to(pre.dtype)
        h, state = rnn_scan(pre, weight, bias, state, cell=self.cell)
        return h.flatten(2), state

    @classmethod
    def _from_torch(cls, module):
        name, kind = cls.__name__, {"lstm": nn.LSTM, "gru": nn.GRU}[cls.cell]
        if type(module) is not kind or module.num_layers != 1 or module.bidirectional or not module.batch_first:
            raise ValueError(
                f"effvit::{name}: module must be a torch.nn.{kind.__name__} of one layer and one direction, "
                f"batch first, got {module}"
            )
        if getattr(module, "proj_size", 0):
            raise ValueError(f"effvit::{name}: module must have proj_size 0, got {module.proj_size}")
        weight = module.weight_hh_l0
        own = cls(module.input_size, module.hidden_size, 1, module.bias, weight.device, weight.dtype)
        with torch.no_grad():
            own.input.weight.copy_(module.weight_ih_l0)
            own.recurrent.copy_(weight.view(own.recurrent.shape))
            if module.bias and own.recurrent_bias is not None:
                own.input.bias.copy_(module.bias_ih_l0)
                own.recurrent_bias.copy_(module.bias_hh_l0.view(own.recurrent_bias.shape))
            elif module.bias:
                own.input.bias.copy_(module.bias_ih_l0 + module.bias_hh_l0)
        return own

    def extra_repr(self):
        return f"{self.input_size}, {self.hidden_size}, num_heads={self.num_heads}"


class FlashLSTM(_HeadwiseRNN):
    """A layer of LSTM cells whose recurrent weights are blocks, one for each head (FlashRNN, arXiv:2412.07752).

    x [B, L, input_size], state or None -> (h [B, L, hidden_size], state [B, 2, num_heads, hidden_size / num_heads]: h
    and c, in float32). `input` makes the gates i, f, g, o of all heads, `recurrent` [heads, gates, D, D] is what
    multiplies a head's h. At one head it is torch.nn.LSTM: see `from_torch`.
    """

    cell = "lstm"

    @classmethod
    def from_torch(cls, module):
        """The same as a torch.nn.LSTM of one layer and one direction, batch first; its two biases are added up."""
        return cls._from_torch(module)


class FlashGRU(_HeadwiseRNN):
    """A layer of GRU cells whose recurrent weights are blocks, one for each head (FlashRNN, arXiv:2412.07752).

    x [B, L, input_size], state or None -> (h [B, L, hidden_size], state [B, 1, num_heads, hidden_size / num_heads] in
    float32). Gates r, z, n; the reset gate applies to the recurrent part with its bias. At one head it is torch.nn.GRU:
    see `from_torch`.
    """

    cell = "gru"
    has_recurrent_bias = True

    @classmethod
    def from_torch(cls, module):
        """The same as a torch.nn.GRU of one layer and one direction, batch first."""
        return cls._from_torch(module)


class FlashSLSTM(_HeadwiseRNN):
    """A layer of xLSTM's sLSTM cells: exponential input gate, memory mixing within heads (arXiv:2405.04517).

    x [B, L, input_size], state or None -> (h [B, L, hidden_size], state [B, 4, num_heads, hidden_size / num_heads]: h,
    c, n and m, in float32). Gates i, f, z, o, the forget gate a sigmoid. The cell alone: convolution, group norm and
    projections of xLSTM's block are not in it.
    """

    cell = "slstm"
