"""LMUFormer: the Legendre memory unit as a linear recurrence, in parallel over all tokens or one after another."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import wide

TOEPLITZ = 512  # tokens up to which the memory is a matrix product; beyond, an FFT


def legendre_matrices(size, theta):
    """A [size, size] and B [size, 1] in float64: the Legendre delay of length theta, discretised (zero-order hold).

    A_ij = (2i + 1) / theta * (-1 if i < j else (-1)^(i - j + 1)), B_i = (2i + 1) (-1)^i / theta; with a step of 1, the
    matrices are blocks of exp([[A, B], [0, 0]]).
    """
    i = torch.arange(size, dtype=torch.float64)
    sign = 1.0 - 2.0 * (i % 2)
    A = torch.where(i[:, None] < i, -1.0, -sign[:, None] * sign) * ((2 * i + 1) / theta)[:, None]
    B = ((2 * i + 1) / theta * sign)[:, None]
    both = torch.linalg.matrix_exp(F.pad(torch.cat([A, B], dim=1), (0, 0, 0, 1)))
    return both[:size, :size], both[:size, size:]


def impulse_response(A, B, length):
    """A^t B for t = 0 .. length - 1: [size, length], twice as many with every product."""
    response, power = B, A
    while response.shape[1] < length:
        response = torch.cat([response, power @ response], dim=1)
        power = power @ power
    return response[:, :length]


def _no_autocast(t):
    device = t.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class LMUFFTCell(nn.Module):
    """The parallel LMU (Chilkuri and Eliasmith, arXiv:2102.11417) with the state_dict of LMUFormer's `LMUFFTCell`.

    x [B, L, input_size] -> h [B, L, hidden_size] and its last token [B, hidden_size]::

        u_t = relu(W_u x_t),    m_t = A m_(t-1) + B u_t,    h_t = relu(W_h [m_t, x_t])

    The memory is the convolution of u, one channel, with the impulse response H of A and B. Up to 512 tokens it is a
    product of the Toeplitz matrix of u with H, beyond that an FFT. H of `seq_len` tokens is a buffer, as in the
    original; longer ones are computed from A and B. `recurrent` takes one token.
    """

    def __init__(self, input_size, hidden_size, memory_size, seq_len, theta, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.hidden_size = hidden_size
        self.memory_size = memory_size
        self.seq_len = seq_len
        self.theta = theta
        self.W_u = nn.Linear(input_size, 1, **factory)
        self.W_h = nn.Linear(memory_size + input_size, hidden_size, **factory)
        A, B = legendre_matrices(memory_size, theta)
        factory["dtype"] = torch.get_default_dtype() if dtype is None else dtype
        for name, t in (("A", A), ("B", B), ("H", impulse_response(A, B, seq_len))):
            self.register_buffer(name, t.to(**factory))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}fft_H", None)  # the transform of H, which the original keeps as well
        super()._load_from_state_dict(state_dict, prefix, *args)

    def memory(self, u):
        """u [B, L] -> m [B, L, memory_size] in float32 (float64 for float64)."""
        L = u.shape[1]
        H = wide(self.H)
        longer = L > self.seq_len
        H = impulse_response(self.A.double(), self.B.double(), L).to(H.dtype) if longer else H[:, :L]
        u = wide(u)
        with _no_autocast(u):
            if L <= TOEPLITZ:
                toeplitz = F.pad(u, (L - 1, 0)).unfold(1, L, 1)  # [B, L, L]: row t is u_(t-L+1) .. u_t
                return toeplitz @ H.flip(1).mT
            spectrum = torch.fft.rfft(u, n=2 * L).unsqueeze(1) * torch.fft.rfft(H, n=2 * L)
            return torch.fft.irfft(spectrum, n=2 * L)[..., :L].mT

    def forward(self, x):
        m = self.memory(F.relu(self.W_u(x)).squeeze(-1)).to(x.dtype)
        h = F.relu(self.W_h(torch.cat([m, x], dim=-1)))
        return h, h[:, -1]

    def recurrent(self, x, m):
        """One token x [B, input_size], the memory before [B, memory_size] -> h [B, hidden_size], the memory after.

        The memory is float32 (float64 for float64), whatever the tokens are.
        """
        u = F.relu(self.W_u(x))
        with _no_autocast(x):
            m = wide(m) @ wide(self.A).mT + wide(u) @ wide(self.B).mT
        return F.relu(self.W_h(torch.cat([m.to(x.dtype), x], dim=-1))), m


class LMU(nn.Module):
    """LMUFormer's block of a Legendre memory unit (arXiv:2402.04882): arguments and state_dict of the original.

    x [B, dim, N] -> [B, dim, N], or [B, dim, 1] of the last token with `use_all_h=False`: the cell (`LMUFFTCell`,
    memory as large as dim), a 1x1 convolution and BatchNorm. `recurrent(x, state)` computes the same token after token
    and returns its state as well; in training, where the norm takes statistics, only for all tokens at once.

    Compared with zeyuliu1037/LMUFormer, src/blocks/lmu.py and lmu_cell.py at 5debadd. There N must be the 128 tokens of
    its `seq_len` and `theta`, which are arguments here, and N may be anything; the buffer fft_H is dropped when a
    state_dict is loaded. The spiking variants are not here. `num_heads` must divide dim; that and `qkv_bias`,
    `qk_scale`, `attn_drop`, `proj_drop` and `sr_ratio` do nothing, as there.
    """

    def __init__(
        self, dim, num_heads=8, qkv_bias=False, qk_scale=None, attn_drop=0.0, proj_drop=0.0, sr_ratio=1, use_all_h=True,
        seq_len=128, theta=128, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"effvit::LMU: dim must be a multiple of num_heads {num_heads}, got {dim}")
        self.dim = dim
        self.use_all_h = use_all_h
        self.lmu = LMUFFTCell(dim, dim, dim, seq_len, theta, **factory)
        self.proj_conv = nn.Conv1d(dim, dim, 1, **factory)
        self.proj_bn = nn.BatchNorm1d(dim, **factory)

    def _project(self, h):
        """[B, N, dim] -> [B, dim, N]; a convolution of one token is a linear map."""
        y = F.linear(h, self.proj_conv.weight.squeeze(-1), self.proj_conv.bias)
        return self.proj_bn(y.mT.contiguous())  # of other strides, compilers expect another gradient than they get

    def forward(self, x):
        h, last = self.lmu(x.mT)
        return self._project(h if self.use_all_h else last.unsqueeze(1))

    def recurrent(self, x, state=None):
        """x [B, dim, N], state [B, memory_size] -> as forward, and the memory after, in float32 or float64."""
        m = wide(x.new_zeros(x.shape[0], self.lmu.memory_size) if state is None else state)
        hs = []
        for token in x.unbind(-1):
            h, m = self.lmu.recurrent(token, m)
            hs.append(h)
        return self._project(torch.stack(hs if self.use_all_h else hs[-1:], dim=1)), m
