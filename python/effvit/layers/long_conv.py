"""Long convolutions with learned kernels: squashed and smoothed taps, and FlashButterfly's learned transforms."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import fft_conv, glu, wide
from ._spectra import CachedSpectra
from .hyena import activation_of, require, without_autocast

FUSED = {"gelu": "gelu", "silu": "silu", "swish": "silu"}  # activations that are part of fft_conv


def taps_before(k):
    """Taps k[.., j] at lags -(j + 1), as the papers' code has them -> those at lags 0, -1, .. of fft_conv's k_rev."""
    return F.pad(k, (1, 0))


def power_of_two(n):
    """The smallest from n on; a number, in a trace of torch.jit too."""
    return 1 << max(int(n) - 1, 0).bit_length()


class PointwiseOutput(CachedSpectra):
    """Projection and activation behind a convolution, on channels: the papers' `output_linear`."""

    def _output_linear(self, inputs, dim, postact, factory):
        if postact is None:
            return nn.Identity()
        linear = nn.Linear(inputs, 2 * dim if postact == "glu" else dim, **factory)
        return nn.Sequential(linear, nn.GLU() if postact == "glu" else activation_of(self, "postact", postact))

    def _mix(self, y):
        """y [B, L, inputs] -> [B, L, dim]"""
        out = self.output_linear
        if isinstance(out, nn.Sequential) and type(out[1]) is nn.GLU:
            return glu(*out[0](y).chunk(2, dim=-1), act="sigmoid")
        return out(y)


class LongConvKernel(nn.Module):
    """Learned taps `kernel` [channels, H, L], and what keeps them simple. `forward()` -> [channels, H, L].

    Smoothed with `use_ma_smoothing`: an average over `ma_window_len` taps, zeros beyond the ends, or with
    `smooth_freq` their spectrum weighted by exp(-m^2 / 2), m = -(window // 2) .. . Then squashed, sign(k) max(|k| -
    lam, 0), and dropped out. `weight_init` is "double_exp" (of 0.02, falling off faster from channel to channel) or
    "random" (of 0.002); defaults are those of the authors' standalone code. With lam above them taps stay zero.
    """

    def __init__(
        self, H, L, channels=1, lam=0.001, kernel_dropout=0.0, weight_init="double_exp", use_ma_smoothing=False,
        ma_window_len=7, smooth_freq=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        require(
            self,
            ("weight_init", weight_init in ("random", "double_exp"), "'random' or 'double_exp'", repr(weight_init)),
            ("ma_window_len", ma_window_len >= 1 and ma_window_len % 2 == 1, "odd", ma_window_len),
        )
        self.L = L
        self.lam = lam
        self.window = ma_window_len if use_ma_smoothing else 0
        self.smooth_freq = smooth_freq
        self.drop = nn.Dropout(kernel_dropout)
        k = torch.randn(channels, H, L, device=device, dtype=dtype)
        if weight_init == "random":
            k = k * 0.002
        else:
            j, i = (torch.arange(n, device=device, dtype=torch.float32) for n in (L, H))
            k = k * 0.02 * torch.exp(-(j / L) * float(H // 2) ** (i[:, None] / H)).to(k.dtype)
        self.kernel = nn.Parameter(k)

    def _smooth(self, k):
        n, L = self.window, k.shape[-1]
        if not self.smooth_freq:
            return F.pad(k, (n // 2, n // 2)).unfold(-1, n, 1).mean(-1)
        spectrum = torch.view_as_real(torch.fft.rfft(k))  # [c, H, F, 2]
        m = torch.arange(n, device=k.device, dtype=k.dtype) - n // 2
        windows = F.pad(spectrum, (0, 0, n // 2, n // 2)).unfold(-2, n, 1)  # [c, H, F, 2, n]
        spectrum = (windows * torch.exp(-0.5 * m * m)).sum(-1)
        return torch.fft.irfft(torch.view_as_complex(spectrum), n=L)

    def forward(self):
        k = wide(self.kernel)
        if self.window:
            k = self._smooth(k)
        return self.drop(F.relu(k.abs() - self.lam) * k.sign())


def _dft_matrix(n, device=None, dtype=torch.float32):
    """exp(-2 pi i a b / n) as [n, n, 2]."""
    a = torch.arange(n, device=device)
    return _roots((a[:, None] * a) % n, n, dtype)


def _roots(power, n, dtype):
    """exp(-2 pi i power / n), real and imaginary part last."""
    angle = power.to(torch.float64) * (-2 * math.pi / n)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).to(dtype)


class BlockFFT(nn.Module):
    """FlashButterfly's transform: Cooley and Tukey's steps with learned matrices in place of small DFTs.

    `forward(x, N)`: x [.., H, n <= N] -> complex [.., H, N], N made a power of two, zeros behind x. With N = m n,
    m = max_m, and T the twiddle factors exp(-2 pi i a b / N)::

        X = M_n (T * (M_m reshape(x, [m, n]))^T)

    where M_n, if n > max_m, is the same recursively. M_2, M_4, .., M_(max_m) [H, n, n, 2], real and imaginary parts,
    start as DFTs, so that X is the FFT of x, in its order; with `learn_additive` they are added to DFTs. H = 1: all
    channels have the same ones. `learn_dft_matrices=False` is the FFT.

    Names of HazyResearch/safari, src/models/sequence/block_fft.py at 26f6223, where each matrix has a second name in
    `dft_matrices`, ignored here; sizes up to max_m are not an error here.
    """

    def __init__(
        self, learn_dft_matrices=True, H=1, max_m=16, dropout=0.0, learn_additive=False, device=None, dtype=None
    ):
        super().__init__()
        require(self, ("max_m", max_m >= 2 and max_m & (max_m - 1) == 0, "a power of two from 2 on", max_m))
        self.learn_dft_matrices = learn_dft_matrices
        self.learn_additive = learn_additive
        self.max_m = max_m
        self.drop = nn.Dropout(dropout)
        dtype = dtype or torch.get_default_dtype()
        for n in (2**i for i in range(1, max_m.bit_length()) if learn_dft_matrices):
            if learn_additive:
                matrix = 0.01 * torch.randn(H, n, n, 2, device=device, dtype=dtype)
            else:
                matrix = _dft_matrix(n, device, dtype).repeat(H, 1, 1, 1)
            self.register_parameter(f"mat_{n}", nn.Parameter(matrix))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in [n for n in state_dict if n.startswith(f"{prefix}dft_matrices.")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _matrix(self, n, x):
        """[H, n, n], complex"""
        matrix = 0
        if self.learn_additive or not self.learn_dft_matrices:
            matrix = _dft_matrix(n, x.device, x.real.dtype)[None]
        if self.learn_dft_matrices:
            matrix = matrix + self.drop(getattr(self, f"mat_{n}").to(x.real.dtype))
        return torch.view_as_complex(matrix)

    def _transform(self, x):
        """x [.., H, N], complex"""
        N = int(x.shape[-1])
        if N <= self.max_m:
            return x if N == 1 else (self._matrix(N, x) @ x.unsqueeze(-1)).squeeze(-1)
        m, n = self.max_m, N // self.max_m
        x = self._matrix(m, x) @ x.unflatten(-1, (m, n))
        a = torch.arange(n, device=x.device)[:, None] * torch.arange(m, device=x.device)
        x = x.mT * torch.view_as_complex(_roots(a, N, x.real.dtype))  # [.., H, n, m]
        if n <= self.max_m:
            return (self._matrix(n, x) @ x).flatten(-2) if n > 1 else x.flatten(-2)
        x = self._transform(x.movedim(-1, 0)).movedim(0, -1)
        return x.flatten(-2)

    def forward(self, x, N):
        N = power_of_two(N)
        x = wide(x) if not x.is_complex() else x
        x = F.pad(x, (0, N - x.shape[-1]))
        with without_autocast(x):
            return self._transform(x if x.is_complex() else torch.complex(x, torch.zeros_like(x)))


class LongConv(PointwiseOutput):
    """The simple long convolution (arXiv:2302.06646): the arguments and the state_dict of the authors' `LongConv`.

    u [B, d_model, L] -> [B, d_model, L], with `transposed=False` [B, L, d_model]; any L. The kernel k has l_max taps::

        y = k * u + D u,    out = glu(W dropout(gelu(y)) + b)

    `channels` > 1 are as many kernels of every channel, whose outputs W takes together. `bidirectional=True` has a
    second kernel, whose tap j is at lag -(j + 1). `kernel_args` are those of `LongConvKernel`: lam, use_ma_smoothing,
    smooth_freq, ma_window_len, kernel_dropout, weight_init. `postact=None` leaves W out. `lengths`, a number or [B] or
    [1] of them, says which tokens there are: those from there on count as zeros. `tie_dropout` drops whole channels.

    `block_fft_conv=True` is FlashButterfly: see there. For inference `cache_spectra(L)` makes the kernel's transform
    once.

    Compared with its formula in plain PyTorch. Names are those of HazyResearch/safari,
    src/models/sequence/long_conv.py at bf27ebe, which returns a pair with None. initializer, weight_norm and `rate`
    are not here, and smoothed spectra have as many taps after as before, where the original loses the last of an odd
    number.

    Raises: ValueError for l_max or channels < 1, an activation without such a name, and what LongConvKernel refuses.
    """

    def __init__(
        self, d_model, l_max=1024, channels=1, bidirectional=False, activation="gelu", postact="glu", dropout=0.0,
        tie_dropout=False, transposed=True, block_fft_conv=False, block_fft_conv_args=None, device=None, dtype=None,
        **kernel_args,
    ):  # fmt: skip
        super().__init__()
        require(self, ("l_max", l_max >= 1, ">= 1", l_max), ("channels", channels >= 1, ">= 1", channels))
        factory = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.l_max = l_max
        self.channels = channels
        self.bidirectional = bidirectional
        self.transposed = transposed
        self.block_fft_conv = block_fft_conv
        self.D = nn.Parameter(torch.randn(channels, d_model, **factory))
        kernels = 2 * channels if bidirectional else channels
        self.kernel = LongConvKernel(d_model, l_max, kernels, **kernel_args, **factory)
        if block_fft_conv:
            self.block_fft_u = BlockFFT(**(block_fft_conv_args or {}), **factory)
            self.block_fft_k = BlockFFT(**(block_fft_conv_args or {}), **factory)
        self.fused = FUSED.get(activation)
        self.activation = activation_of(self, "activation", activation)
        self.dropout = (nn.Dropout1d if tie_dropout else nn.Dropout)(dropout)
        self.output_linear = self._output_linear(channels * d_model, d_model, postact, factory)

    def forward(self, u, lengths=None):
        u = u if self.transposed else u.mT
        L = u.shape[-1]
        if lengths is not None:
            lengths = torch.as_tensor(lengths, device=u.device).reshape(-1, 1, 1)
            u = u * (torch.arange(L, device=u.device) < lengths)
        if L == 0:
            y = u.repeat(1, self.channels, 1) * self.D.flatten().unsqueeze(-1).to(u.dtype)
        else:
            y = self._butterfly(u) if self.block_fft_conv else self._convolve(u)
        y = self._mix(self.dropout(y).mT)
        return y.mT if self.transposed else y

    def _taps(self, L):
        """Both kernels [channels, d_model, at most L], the second one or None."""
        k = self.kernel()[..., :L]
        return k.chunk(2) if self.bidirectional else (k, None)

    def _kernels(self, size):
        require(self, ("cache_spectra", not self.block_fft_conv, "of an FFT", "learned transforms"))
        k, back = (t if t is None else t.flatten(0, 1) for t in self._taps(*size))
        return [{"k": k, "k_rev": None if back is None else taps_before(back)}]

    def _convolve(self, u):
        """u [B, H, L] -> activation(y) [B, channels H, L]"""
        (kernel,) = self._convolutions(u, u.shape[-1])
        u = u.repeat(1, self.channels, 1) if self.channels > 1 else u
        y = fft_conv(u, d=self.D.flatten(), act=self.fused or "none", **kernel)
        return y if self.fused else self.activation(y)

    def _butterfly(self, u):
        if u.shape[0] == 0:  # an error of PyTorch's FFT
            return u.repeat(1, self.channels, 1)
        L = u.shape[-1]
        k, back = self._taps(L)
        taps = k.shape[-1]
        N = power_of_two(L + taps)
        k = F.pad(k, (0, N - taps))
        if back is not None:
            k = k + F.pad(back.flip(-1), (N - taps, 0))
        spectrum = self.block_fft_u(u, N).unsqueeze(1) * self.block_fft_k(k, N)  # [B, c, H, N]
        y = torch.fft.ifft(spectrum).real[..., :L] + wide(u).unsqueeze(1) * wide(self.D).unsqueeze(-1)
        return self.activation(y.flatten(1, 2).to(u.dtype))

    def extra_repr(self):
        return (
            f"d_model={self.d_model}, l_max={self.l_max}, channels={self.channels}, bidirectional={self.bidirectional}"
        )


class FlashButterfly(LongConv):
    """FlashButterfly (arXiv:2302.06646): `LongConv` with transforms learned for u and for k.

    u [B, d_model, L] -> [B, d_model, L]. y = real(ifft(B_u(u) B_k(k))) + D u, B_u and B_k `BlockFFT`s of
    `block_fft_conv_args` and ifft the true inverse: at first, when they are DFTs, the convolution. N is the power of
    two from L + l_max on (the authors' code is right where L + l_max is one). The convolution is in plain PyTorch: no
    FFT can stand in for learned matrices.
    """

    def __init__(self, d_model, l_max=1024, **kwargs):
        super().__init__(d_model, l_max, **{**kwargs, "block_fft_conv": True})
