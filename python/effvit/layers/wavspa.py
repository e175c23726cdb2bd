"""WavSpA: attention in wavelet space, between a wavelet transform of the tokens and its inverse."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import fft_conv, softmax_attention, wide
from .hyena import require, without_autocast


def daubechies(taps):
    """Daubechies' low-pass filter of `taps` numbers, float64, for the analysis: the extremal phase, its energy last.

    |H|^2 = 2 ((1 + cos w) / 2)^n P((1 - cos w) / 2) with P(y) = sum_k binom(n - 1 + k, k) y^k and n = taps / 2; the
    factor H takes the zeros within the unit circle.
    """
    n = taps // 2
    P = torch.tensor([float(math.comb(n - 1 + k, k)) for k in range(n)], dtype=torch.float64)
    h = torch.ones(1, dtype=torch.complex128)
    for _ in range(n):
        h = F.pad(h, (0, 1)) + F.pad(h, (1, 0))
    if n > 1:
        companion = torch.diag(torch.ones(n - 2, dtype=torch.float64), -1)
        companion[:, -1] = -P[:-1] / P[-1]
        y = torch.linalg.eigvals(companion)
        # y = (2 - z - 1 / z) / 4: of the two z, whose product is 1, the one within the circle
        b = 1 - 2 * y
        root = torch.sqrt(b * b - 1)
        z = torch.where((b + root).abs() < 1, b + root, b - root)
        for zero in z:
            h = F.pad(h, (0, 1)) - zero * F.pad(h, (1, 0))
    h = h.real
    return (h * math.sqrt(2) / h.sum()).flip(0)


class SoftmaxAttention(nn.Module):
    """Softmax attention of all tokens x [B, n, dim], without biases."""

    def __init__(self, dim, num_heads, device=None, dtype=None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(softmax_attention(q, k, v).transpose(1, 2).flatten(2))


class WavSpA(nn.Module):
    """Wavelet-space attention (arXiv:2210.01989): transform, attention in every level, inverse transform.

    x [B, L, dim] -> [B, L, dim], any L: zeros behind x make it a multiple of 2^level, and are cut off in the end. A
    step of the transform halves the tokens, around a circle; `level` steps are applied to the low-pass result::

        low_n = sum_j h_j x_(2n + K/2 - j),    high_n = sum_j g_j x_(2n + K/2 - j),    g_j = -(-1)^j h_(K-1-j)

    The inverse is the transpose: exact where h is orthonormal. The level + 1 results, the last low-pass first, each go
    through an attention of their own, `attentions[i]`.

    `wavelet` is "haar" or "db1" .. "db20", of 2 n taps; "ortho": h of `wlen` taps for every channel from learned angles
    `thetas`, orthonormal whatever they are. `learned=True` has h as a parameter `adawave` [K, dim], Daubechies' at
    first. `attention(dim)` makes each attention, a module of [B, n, dim]; None: softmax attention of `num_heads` heads
    without biases. Transforms are computed in float32.

    Compared with its formula with dense matrices. The authors' code, EvanZhuang/wavspa at 0610f76, is in JAX, reflects
    the tokens at the ends, and has the norm, residual and MLP of a block around this; parametrisations are its own.

    Raises: ValueError for dim that num_heads does not divide, level < 1, an unknown wavelet, or an odd wlen.
    """

    def __init__(
        self, dim, num_heads=8, level=2, wavelet="db2", learned=False, wlen=8, attention=None, device=None, dtype=None
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        named = {"haar": 1} | {f"db{n}": n for n in range(1, 21)}
        known = wavelet in named or wavelet == "ortho"
        divides = attention is not None or (num_heads >= 1 and dim % num_heads == 0)
        require(
            self,
            ("dim", divides, f"a multiple of num_heads {num_heads}", dim),
            ("level", level >= 1, ">= 1", level),
            ("wavelet", known, "'haar', 'db1' .. 'db20' or 'ortho'", repr(wavelet)),
            ("wlen", wlen >= 2 and wlen % 2 == 0, "even", wlen),
        )
        self.level = level
        self.wavelet = wavelet
        self.learned = learned
        self.taps = wlen if wavelet == "ortho" else 2 * named[wavelet]
        if wavelet == "ortho":
            self.thetas = nn.Parameter(torch.rand(wlen // 2, dim, **factory) * (2 * math.pi))
        else:
            h = daubechies(self.taps).to(device=device, dtype=dtype or torch.get_default_dtype())
            if learned:
                self.adawave = nn.Parameter(h[:, None].repeat(1, dim))
            else:
                self.register_buffer("filter", h[:, None], persistent=False)
        make = attention or (lambda dim: SoftmaxAttention(dim, num_heads, **factory))
        self.attentions = nn.ModuleList(make(dim) for _ in range(level + 1))

    def low_pass(self):
        """h [K, dim], or [K, 1] where all channels have the same."""
        if self.wavelet != "ortho":
            return wide(self.adawave if self.learned else self.filter)
        thetas = wide(self.thetas)
        h = F.pad(torch.ones_like(thetas[:1]), (0, 0, 0, self.taps - 1))  # [K, dim]
        for theta in thetas:
            sin, cos = theta.sin(), theta.cos()
            a, b = h.unflatten(0, (-1, 2)).unbind(1)
            h = torch.stack((a * sin + b * cos, a * cos - b * sin), dim=1).flatten(0, 1).roll(1, 0)
        return h.roll(-1, 0)

    def _phases(self):
        """Taps [2 filters, 2 phases, n, dim] on even and odd tokens, at lags -T, -T + 1, .., and T."""
        h = self.low_pass()
        K = self.taps  # an int under torch.jit.trace too, where h.shape[0] is a tensor
        signs = torch.ones(K, 1, device=h.device, dtype=h.dtype)
        signs[0::2] = -1
        both = F.pad(torch.stack((h, h.flip(0) * signs)), (0, 0, 1, 1))  # a zero on either side
        T = K // 4
        last = (1 - K // 2) // 2
        # token 2 (n + t) + phase is tap K/2 - 2 t - phase
        taps = [[K // 2 - 2 * t - phase + 1 for t in range(T, last - 1, -1)] for phase in (0, 1)]
        return both[:, torch.tensor(taps, device=h.device)], T

    @staticmethod
    def _convolve(x, k):
        """x [B, n, C], k [taps, C]: a circular convolution"""
        return x * k[0] if k.shape[0] == 1 else fft_conv(x, k.mT, mode="circular", channels_last=True)

    def decompose(self, x):
        """x [B, L, dim] -> the low-pass tokens of the last level, its high-pass tokens, .., those of the first."""
        with without_autocast(x):
            return self._decompose(F.pad(wide(x), (0, 0, 0, -x.shape[1] % 2**self.level)))

    def _decompose(self, x):
        k, T = self._phases()
        k = k.expand(-1, -1, -1, x.shape[-1]).transpose(1, 2)  # [2, n, 2, dim]
        k = k.transpose(0, 1).flatten(1)
        high = []
        for _ in range(self.level):
            y = self._convolve(x.unflatten(1, (-1, 2)).flatten(2).repeat(1, 1, 2), k)
            x, detail = y.roll(-T, 1).unflatten(-1, (2, 2, -1)).sum(3).unbind(2)
            high.append(detail)
        return [x, *reversed(high)]

    def reconstruct(self, parts, length):
        """The inverse of `decompose`: [B, length, dim]."""
        with without_autocast(parts[0]):
            return self._reconstruct(parts)[:, :length]

    def _reconstruct(self, parts):
        k, T = self._phases()
        first = T - k.shape[2] + 1  # the lowest lag
        x = wide(parts[0])
        k = k.flip(2).expand(-1, -1, -1, x.shape[-1])  # [2, 2, n, dim]
        k = k.permute(2, 0, 1, 3).flatten(1)
        for detail in parts[1:]:
            both = torch.stack((x, wide(detail)), dim=2).unsqueeze(3).expand(-1, -1, -1, 2, -1)
            y = self._convolve(both.flatten(2), k).roll(first, 1)
            x = y.unflatten(-1, (2, 2, -1)).sum(2).flatten(1, 2)
        return x

    def forward(self, x):
        parts = [attend(part.to(x.dtype)) for attend, part in zip(self.attentions, self.decompose(x), strict=True)]
        return self.reconstruct(parts, x.shape[1]).to(x.dtype)

    def extra_repr(self):
        return f"level={self.level}, wavelet={self.wavelet!r}"
