"""MEGA's multi-dimensional damped moving average: a long convolution, or a recurrence token after token."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import fft_conv, wide
from ._spectra import CachedSpectra
from .hyena import require, without_autocast


class MultiHeadEMA(CachedSpectra):
    """MEGA's exponential moving average (arXiv:2209.10655): arguments and state_dict of the authors' `MultiHeadEMA`.

    x [B, L, embed_dim] -> [B, L, embed_dim], any L. Every channel has `ndim` averages h, which forget by q::

        p = sigmoid(delta),    q = 1 - p sigmoid(alpha)
        h_t = q h_(t-1) + p beta x_t,    out_t = silu(sum_n gamma_n h_(t,n) / sqrt(ndim) + omega x_t)

    computed as one `fft_conv` with k_l = sum_n gamma p beta q^l / sqrt(ndim) of L taps, `truncation` at most.
    `bidirectional=True` adds another such average of what comes after, each with the token itself. `padding_mask`
    [B, L], 1 where x is padding: these tokens enter no average.

    With `return_state` the averages after the last token [B, embed_dim, ndim] as well, in float32 (float64 for
    float64), which `state` takes up; not bidirectional, and without truncation. `step(x, state)` is one token
    [B, embed_dim] -> the same shape and the state after. For inference `cache_spectra(L)` makes the kernel's transform
    once. Under autocast every call casts x, as `fft_conv` does, and computes in float32.

    Compared with its formula in plain PyTorch. Names are those of facebookresearch/mega,
    fairseq/modules/exponential_moving_average.py at cfc14f2, where x is [L, B, embed_dim].

    Raises: ValueError for ndim < 1, and for a state with bidirectional or truncation.
    """

    def __init__(self, embed_dim, ndim=2, bidirectional=False, truncation=None, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        require(
            self,
            ("ndim", ndim >= 1, ">= 1", ndim),
            ("truncation", truncation is None or truncation >= 1, "None or >= 1", truncation),
        )
        self.embed_dim = embed_dim
        self.ndim = ndim
        self.bidirectional = bidirectional
        self.truncation = truncation
        self.scale = ndim**-0.5
        kernels = 2 * embed_dim if bidirectional else embed_dim
        self.delta = nn.Parameter(torch.empty(kernels, ndim, 1, **factory).normal_(std=0.2))
        self.alpha = nn.Parameter(torch.empty(kernels, ndim, 1, **factory).normal_(std=0.2))
        signs = torch.ones(ndim, 1, **factory)
        signs[1::2] = -1
        self.beta = nn.Parameter(torch.empty(kernels, ndim, 1, **factory).normal_(std=0.02) + signs)
        self.gamma = nn.Parameter(torch.empty(kernels, ndim, **factory).normal_())
        self.omega = nn.Parameter(torch.empty(embed_dim, **factory).normal_())

    def _coefficients(self):
        """p beta, log(q) and gamma / sqrt(ndim) [kernels, ndim], in float32."""
        p = torch.sigmoid(wide(self.delta.squeeze(-1)))
        forget = p * torch.sigmoid(wide(self.alpha.squeeze(-1)))
        # below 1: log(0) times the power 0 is NaN
        log_q = torch.log1p(-forget.clamp(max=1 - torch.finfo(forget.dtype).eps / 2))
        return p * wide(self.beta.squeeze(-1)), log_q, wide(self.gamma) * self.scale

    @staticmethod
    def _powers(log_q, length):
        """q^(m a) [kernels, a, ndim] and q^b [kernels, ndim, b < m], whose products are the powers below length."""
        m = max(math.isqrt(max(int(length) - 1, 0)), 1)
        a, b = (torch.arange(n, device=log_q.device, dtype=log_q.dtype) for n in (-(-int(length) // m), m))
        return torch.exp(log_q.unsqueeze(1) * (m * a).unsqueeze(-1)), torch.exp(log_q.unsqueeze(-1) * b)

    def kernel(self, length):
        """[kernels, length]: the taps of the convolution."""
        scale, log_q, gamma = self._coefficients()
        whole, rest = self._powers(log_q, length)
        with without_autocast(whole):
            return ((whole * (scale * gamma).unsqueeze(1)) @ rest).flatten(1)[:, :length]

    def _kernels(self, size):
        k = self.kernel(size[0] if self.truncation is None else min(size[0], self.truncation))
        k, back = k.chunk(2) if self.bidirectional else (k, None)
        return [{"k": k, "k_rev": back}]

    def _refuse_state(self):
        if self.bidirectional or self.truncation is not None:
            what = "bidirectional" if self.bidirectional else "truncation"
            raise ValueError(f"effvit::MultiHeadEMA: state must be None with {what}: there is no recurrence")

    @staticmethod
    def _cast(x):
        """In the dtype of autocast where that is on, as the operator casts it."""
        device = x.device.type
        if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
            return x
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    def forward(self, x, padding_mask=None, state=None, return_state=False):
        if state is not None or return_state:
            self._refuse_state()
        x = self._cast(x)
        L = x.shape[1]
        if L == 0:
            y = F.silu(wide(x) * wide(self.omega)).to(x.dtype)
            empty = wide(x).new_zeros(x.shape[0], self.embed_dim, self.ndim) if state is None else wide(state)
            return (y, empty) if return_state else y
        (kernel,) = self._convolutions(x, L)
        if padding_mask is None and state is None:
            y = fft_conv(x, d=self.omega, act="silu", channels_last=True, **kernel)
            return (y, self._state_after(x, None)) if return_state else y
        u = x if padding_mask is None else x * (1 - padding_mask.to(x.dtype)).unsqueeze(-1)
        with without_autocast(x):
            y = fft_conv(wide(u), channels_last=True, **kernel) + wide(x) * wide(self.omega)
        if state is not None:
            _, log_q, gamma = self._coefficients()
            whole, rest = self._powers(log_q, L)
            with without_autocast(y):
                left = wide(state) * gamma * torch.exp(log_q)  # what is left of it at the first token
                y = y + ((left.unsqueeze(2) * whole) @ rest).flatten(2)[..., :L].mT
        y = F.silu(y).to(x.dtype)
        return (y, self._state_after(u, state)) if return_state else y

    def _state_after(self, u, state):
        """sum_t q^(L - 1 - t) p beta u_t, plus q^L times the state before"""
        scale, log_q, _ = self._coefficients()
        L = u.shape[1]
        whole, rest = self._powers(log_q, L)
        with without_autocast(u):
            u = F.pad(wide(u).flip(1).mT, (0, whole.shape[1] * rest.shape[2] - L))  # the last token first
            u = u.unflatten(-1, (whole.shape[1], -1))  # [B, d, a, b]
            after = ((u @ rest.mT) * whole).sum(2) * scale
        return after if state is None else after + torch.exp(log_q * L) * wide(state)

    def step(self, x, state=None):
        """One token x [B, embed_dim], the state before [B, embed_dim, ndim] or None -> its output, the state after."""
        self._refuse_state()
        x = self._cast(x)
        scale, log_q, gamma = self._coefficients()
        after = scale * wide(x).unsqueeze(-1)
        if state is not None:
            after = after + torch.exp(log_q) * wide(state)
        return F.silu((after * gamma).sum(-1) + wide(x) * wide(self.omega)).to(x.dtype), after

    def extra_repr(self):
        return (
            f"embed_dim={self.embed_dim}, ndim={self.ndim}, bidirectional={self.bidirectional}, "
            f"truncation={self.truncation}"
        )
