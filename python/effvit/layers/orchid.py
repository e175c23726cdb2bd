"""Orchid: global convolutions whose kernels depend on the data, one for every sample."""

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import dwconv_tokens, fft_conv, fft_conv_spectrum, wide
from .hyena import HyenaFilter, activation_of, require, without_autocast

KERNELS = ("absfreq", "corrTime")
NETWORKS = ("convt", "convtf")


class KernelNorm(nn.Module):
    """LayerNorm over channels under the name that the authors' code has for it, or nothing."""

    def __init__(self, norm, width, factory):
        super().__init__()
        self.norm_conv_kernel = nn.LayerNorm(width, **factory) if norm == "layernorm" else nn.Identity()

    def forward(self, x):
        return self.norm_conv_kernel(x)


class ConditioningConvolutions(nn.Module):
    """x [B, n, groups * inputs] -> [B, n, groups * outputs]: convolutions along tokens or frequencies, and norms."""

    def __init__(self, groups, inputs, outputs, kernel_size, layers, bias, norm, activation, factory):
        super().__init__()
        widths = [groups * inputs] + [groups * outputs] * layers
        self.conv1d_ls = nn.ModuleList(
            nn.Conv1d(a, b, kernel_size, padding=(kernel_size - 1) // 2, groups=groups, bias=bias, **factory)
            for a, b in zip(widths, widths[1:], strict=False)
        )
        self.norm_ls = nn.ModuleList(KernelNorm(norm, b, factory) for b in widths[1:])
        self.activation = activation

    def forward(self, x):
        for i, (conv, norm) in enumerate(zip(self.conv1d_ls, self.norm_ls, strict=True)):
            if conv.in_channels == conv.out_channels == conv.groups:
                x = dwconv_tokens(x, conv.weight, conv.bias, causal=False)
            else:
                x = conv(x.to(conv.weight.dtype).mT).mT
            x = norm(x if i == len(self.conv1d_ls) - 1 else self.activation(x))
        return x


class ConditioningNetwork(nn.Module):
    """Orchid's network from tokens to kernels: x [B, L, dim] -> spectra [B, dim, F] of F = n // 2 + 1, complex.

    n = 2 L with `causal`, else L. "absfreq": |rfft(c(x), n) / n|^2, "corrTime": conj(rfft(c_k(x), n) / n) rfft(c_q(x),
    n) / n, with convolutions c along the tokens; "convtf" has another convolution along the frequencies.
    """

    def __init__(self, dim, kernel_type, network, causal, convolutions, factory):
        super().__init__()
        self.kernel_type = kernel_type
        self.network = network
        self.causal = causal
        tokens = lambda: ConditioningConvolutions(dim, 1, 1, **convolutions, factory=factory)
        if kernel_type == "absfreq":
            self.nn_model = tokens()
            if network == "convtf":
                self.nn_model2 = ConditioningConvolutions(dim, 1, 2, **convolutions, factory=factory)
        else:
            self.nn_model_k = tokens()
            self.nn_model_q = tokens()
            if network == "convtf":
                self.nn_model_frq = ConditioningConvolutions(dim, 2, 2, **convolutions, factory=factory)

    def _transform(self, x):
        """[B, L, dim] -> [B, F, dim], complex"""
        n = (2 if self.causal else 1) * x.shape[1]
        return torch.fft.rfft(wide(x), n=n, dim=1) / n

    def forward(self, x):
        if self.kernel_type == "absfreq":
            power = torch.view_as_real(self._transform(self.nn_model(x))).square().sum(-1)  # [B, F, dim]
            if self.network == "convt":
                spectrum = torch.complex(power, torch.zeros_like(power))
            else:
                y = wide(self.nn_model2(power))
                spectrum = torch.complex(y[..., 0::2], y[..., 1::2])
        else:
            spectrum = self._transform(self.nn_model_k(x)).conj() * self._transform(self.nn_model_q(x))
            if self.network == "convtf":
                y = wide(self.nn_model_frq(torch.cat((spectrum.real, spectrum.imag), dim=-1)))
                spectrum = torch.complex(*y.chunk(2, dim=-1))
        return spectrum.mT


class OrchidOperator(nn.Module):
    """Orchid's operator (arXiv:2402.18508): the state_dict of the authors' `OrchidOperator`.

    u [B, L, d_model] -> [B, L, d_model], any L. One circular convolution between two gates, with a fixed implicit
    filter k (`HyenaFilter`) and, added to its spectrum, one that a small network makes of every sample::

        x_0, x_1, v = split(short(w)),    w = in_linear(u)
        y = x_0 (irfft(rfft(v x_1) (rfft(k) / L + h(w_v))) + D v x_1),    out = out_linear(y + r)

    w_v are the channels of w that become v. `kernel_type` "absfreq": h = |rfft(c(w_v)) / n|^2, the phase suppressed;
    "corrTime": h = conj(rfft(c_k(w_v)) / n) rfft(c_q(w_v)) / n, a correlation. c are depthwise convolutions of
    `conv_filter_size` taps and LayerNorms (`norm="none"`: without), as many as `n_layer`; `network="convtf"` has the
    same along the frequencies of h. `causal=True`, of "absfreq" alone: n = 2 L, and h becomes a kernel of L taps in
    time; the convolution stays circular, as in the authors' code. `residual_long_conv`: r is the circular convolution
    of u with another implicit filter, divided by L, and its bias times u; None: r = 0. `l_max` is the number of taps of
    the fixed filters: shorter inputs take fewer.

    Compared with its formula in plain PyTorch. Names are those of Karami-m/orchid,
    orchid_standalone/orchid_standalone.py at 061f6df, with dxt="fft", order 2 and one head; its `conv_kernel` settings
    are arguments here, and `normalized` filters are so before their windows, not after. The paper's |.| is a square
    there, and so here.

    Raises: ValueError for l_max, conv_filter_size or n_layer < 1, an even conv_filter_size, an unknown kernel_type,
    network or norm, causal with "corrTime", bidirectional, and what HyenaFilter refuses.
    """

    def __init__(
        self, d_model, l_max=128, filter_order=64, filter_dropout=0.0, residual_long_conv="sconv", short_filter_order=3,
        kernel_type="absfreq", network="convtf", conv_filter_size=3, n_layer=1, norm="layernorm", activation="gelu",
        conv_bias=True, causal=True, device=None, dtype=None, **filter_args,
    ):  # fmt: skip
        super().__init__()
        odd = conv_filter_size >= 1 and conv_filter_size % 2 == 1
        require(
            self,
            ("l_max", l_max >= 1, ">= 1", l_max),
            ("residual_long_conv", residual_long_conv in ("sconv", None), "'sconv' or None", repr(residual_long_conv)),
            ("kernel_type", kernel_type in KERNELS, f"one of {KERNELS}", repr(kernel_type)),
            ("network", network in NETWORKS, f"one of {NETWORKS}", repr(network)),
            ("norm", norm in ("layernorm", "none"), "'layernorm' or 'none'", repr(norm)),
            ("conv_filter_size", odd, "odd", conv_filter_size),
            ("n_layer", n_layer >= 1, ">= 1", n_layer),
            ("bidirectional", not filter_args.get("bidirectional"), "False: convolutions are circular", True),
            ("causal", not causal or kernel_type == "absfreq", "False with 'corrTime'", causal),
        )
        factory = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.l_max = l_max
        self.causal = causal
        self.residual_long_conv = residual_long_conv
        self.in_linear = nn.Linear(d_model, 3 * d_model, **factory)
        self.out_linear = nn.Linear(d_model, d_model, **factory)
        self.conv1d_short = nn.Conv1d(
            3 * d_model, 3 * d_model, short_filter_order, groups=3 * d_model, padding=short_filter_order - 1, **factory
        )
        filters = {"order": filter_order, "seq_len": l_max, "dropout": filter_dropout, **filter_args, **factory}
        self.fixed_conv = HyenaFilter(d_model, **filters)
        if residual_long_conv is not None:
            self.fixed_conv_res = HyenaFilter(d_model, **filters)
        convolutions = {
            "kernel_size": conv_filter_size, "layers": n_layer, "bias": conv_bias, "norm": norm,
            "activation": activation_of(self, "activation", activation),
        }  # fmt: skip
        self.conv_kernel_nn = ConditioningNetwork(d_model, kernel_type, network, causal, convolutions, factory)

    def forward(self, u):
        L = u.shape[1]
        if u.shape[0] == 0 or L == 0:  # an error of PyTorch's FFT
            return self.out_linear(u)
        w = self.in_linear(u)
        with without_autocast(u):
            h = self.conv_kernel_nn(w[..., 2 * self.d_model :].to(self.out_linear.weight.dtype))  # [B, d, F]
        x0, x1, v = dwconv_tokens(w, self.conv1d_short.weight, self.conv1d_short.bias).split(self.d_model, dim=-1)
        k = wide(self.fixed_conv.filter(min(L, self.l_max)).mT)
        scale = 1 / max(L, 1)
        options = {"mode": "circular", "channels_last": True}
        d = self.fixed_conv.bias if self.fixed_conv.use_bias else None
        if self.causal:
            h = torch.fft.irfft(h, n=2 * L, norm="forward")[..., :L]
            kernel = {"k": F.pad(k, (0, L - k.shape[-1])) + h, "kernel_scale": scale}
        else:
            kernel = {"spectrum": fft_conv_spectrum(k, L, mode="circular", kernel_scale=scale) + h}
        y = fft_conv(v, d=d, pregate=x1, postgate=x0, **kernel, **options)
        if self.residual_long_conv is not None:
            f = self.fixed_conv_res
            k = f.filter(min(L, self.l_max)).mT
            y = y + fft_conv(u, k, f.bias if f.use_bias else None, kernel_scale=scale, **options)
        return self.out_linear(y)

    def extra_repr(self):
        n = self.conv_kernel_nn
        return f"d_model={self.d_model}, l_max={self.l_max}, kernel_type={n.kernel_type!r}, network={n.network!r}"
