"""Hyena: long convolutions with implicit filters, gated by the data, in place of attention."""

import math
from contextlib import nullcontext

import torch
from torch import nn

from ._ops import dwconv_tokens, fft_conv
from ._spectra import CachedSpectra

ACTIVATIONS = {
    "id": nn.Identity, "identity": nn.Identity, "linear": nn.Identity, None: nn.Identity, "gelu": nn.GELU,
    "silu": nn.SiLU, "swish": nn.SiLU, "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
}  # fmt: skip


def activation_of(module, name, activation):
    """The activation's module by its name in the papers' code; ValueError in the name of the module."""
    if activation not in ACTIVATIONS:
        known = ", ".join(str(a) for a in ACTIVATIONS)
        raise ValueError(f"effvit::{type(module).__name__}: {name} must be one of {known}, got {activation!r}")
    return ACTIVATIONS[activation]()


def require(module, *conditions):
    """(argument, whether it is right, what is expected, what was given) each; ValueError for the first that is not."""
    for name, ok, expected, got in conditions:
        if not ok:
            raise ValueError(f"effvit::{type(module).__name__}: {name} must be {expected}, got {got}")


def without_autocast(t):
    """Filters are computed in the dtype of their parameters: positions rounded to 8 bits would coincide."""
    device = t.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def parameter_or_buffer(module, name, value, learned, device=None, dtype=None):
    """What the papers' code registers as a parameter, or as a buffer where its learning rate is 0."""
    value = value.to(device=device, dtype=dtype or torch.get_default_dtype())
    if learned:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


class Sine(nn.Module):
    """sin(freq * x), freq [1, dim] one learned number per channel."""

    def __init__(self, freq):
        super().__init__()
        self.freq = freq

    def forward(self, x):
        return torch.sin(self.freq * x)


class FilterPositions(nn.Module):
    """z [1, seq_len, emb_dim]: t = 0 .. 1, and cos(f w), -sin(f w) with w = 2 pi position / seq_len in each band f."""

    def __init__(self, emb_dim, seq_len, learned, device=None, dtype=None):
        super().__init__()
        bands = (emb_dim - 1) // 2
        t = torch.linspace(0, 1, seq_len, dtype=torch.float64)[:, None]
        w = torch.arange(seq_len, dtype=torch.float64)[:, None] * (2 * math.pi / seq_len)
        angle = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64) * w
        z = torch.cat([t, angle.cos(), -angle.sin()], dim=-1)[None]
        parameter_or_buffer(self, "z", z, learned, device, dtype)
        parameter_or_buffer(self, "t", t[None], False, device, dtype)


class ExponentialModulation(nn.Module):
    """h * (exp(-t |deltas|) + shift): channels that forget fast and slowly, to `target` at 0.3 .. 1.5 of seq_len."""

    def __init__(self, dim, fast_decay_pct, slow_decay_pct, target, shift, learned, device=None, dtype=None):
        super().__init__()
        self.shift = shift
        ends = (math.log(target) / slow_decay_pct, math.log(target) / fast_decay_pct)
        deltas = torch.linspace(*ends, dim, dtype=torch.float64)[None, None]
        parameter_or_buffer(self, "deltas", deltas, learned, device, dtype)

    def forward(self, t, h):
        return h * (torch.exp(-t * self.deltas.abs()) + self.shift)


def frequencies(order, w, device=None, dtype=None):
    """freq of all layers of a filter's MLPs: they share one, as in the papers' code."""
    return nn.Parameter(torch.full((1, order), float(w), device=device, dtype=dtype))


def implicit_filter(emb_dim, order, dim, inner, freq, factory):
    """The MLP from positions to taps. One `freq`, but a module each: functional_call restores no module twice."""
    layers = [nn.Linear(emb_dim, order, **factory), Sine(freq)]
    for _ in range(inner):
        layers += [nn.Linear(order, order, **factory), Sine(freq)]
    return nn.Sequential(*layers, nn.Linear(order, dim, bias=False, **factory))


class HyenaFilter(nn.Module):
    """Hyena's implicit filter: taps of `d_model` channels from an MLP of the positions with sine activations.

    `filter(L)` -> [L, d_model], L <= seq_len: MLP(z) * (exp(-t |deltas|) + shift); with `bidirectional` `filter_rev(L)`
    is that of another MLP, for what comes after. z is learned unless `lr_pos_emb` is 0, deltas if `modulation_lr` is
    not: those learning rates are for the optimiser, which is told nothing else here. `dropout` does nothing, as there.
    Computed in the dtype of the parameters, under autocast too. State_dict of HazyResearch/safari's `HyenaFilter`.
    """

    def __init__(
        self, d_model, emb_dim=3, order=16, seq_len=1024, lr_pos_emb=1e-5, dropout=0.0, w=1, bias=True,
        num_inner_mlps=2, normalized=False, modulate=True, fast_decay_pct=0.3, slow_decay_pct=1.5, target=1e-2,
        modulation_lr=0.0, shift=0.0, bidirectional=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        require(
            self,
            ("emb_dim", emb_dim >= 3 and emb_dim % 2 == 1, "odd and at least 3 (time, sines and cosines)", emb_dim),
            ("seq_len", seq_len >= 1, ">= 1", seq_len),
        )
        factory = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.seq_len = seq_len
        self.use_bias = bias
        self.modulate = modulate
        self.normalized = normalized
        self.bias = nn.Parameter(torch.randn(d_model, **factory))
        self.pos_emb = FilterPositions(emb_dim, seq_len, lr_pos_emb != 0, **factory)
        freq = frequencies(order, w, **factory)
        self.implicit_filter = implicit_filter(emb_dim, order, d_model, num_inner_mlps, freq, factory)
        if bidirectional:
            self.implicit_filter_rev = implicit_filter(emb_dim, order, d_model, num_inner_mlps, freq, factory)
        self.modulation = ExponentialModulation(
            d_model, fast_decay_pct, slow_decay_pct, target, shift, modulation_lr != 0, **factory
        )

    def _taps(self, mlp, L):
        with without_autocast(self.bias):
            h = mlp(self.pos_emb.z[0, :L])
            if self.normalized:
                h = h / h.abs().sum(-1, keepdim=True)
            return self.modulation(self.pos_emb.t[0, :L], h[None])[0] if self.modulate else h

    def filter(self, L):
        """[L, d_model]: taps at lags 0 .. L - 1."""
        return self._taps(self.implicit_filter, L)

    def filter_rev(self, L):
        """[L, d_model]: taps at lags 0 .. -(L - 1)."""
        return self._taps(self.implicit_filter_rev, L)


class HyenaOperator(CachedSpectra):
    """Hyena's operator (arXiv:2302.10866): the state_dict of the authors' `HyenaOperator`.

    u [B, L, d_model] -> [B, L, d_model], any dtype of the operators. order + 1 projections go through a causal
    depthwise convolution of `short_filter_order` taps; then, with filters h_i and biases D_i of `HyenaFilter`::

        x_0, .., x_(order - 1), v = split(short_filter(in_proj(u)))
        v = h_i * (v x_i) + D_i v x_i    for i = order - 1, .., 1
        out = out_proj(activation(v x_0))

    Each step is one `fft_conv` with its gates. `l_max` is the number of taps: a longer input is convolved with l_max
    taps (the authors' code cuts it off). `bidirectional=True` adds a filter of what comes after, whose tap at lag 0
    adds to the other's (k_f + conj(k_rev_f) in the authors' fftconv); the short filter stays causal. `filter_args` are
    those of `HyenaFilter`: emb_dim, w, num_inner_mlps, shift, ... `dropout` is that of each v x_i. For inference
    `cache_spectra(L)` makes the filters' transforms once.

    Compared with its formula in plain PyTorch. Names are those of HazyResearch/safari,
    src/models/sequence/hyena.py at c1b5c7b. Several heads, blocks and inner_factor, outer_mixing and post_order_ffn
    are not here.

    Raises: ValueError for order < 2, l_max < 1, an activation without such a name, or what HyenaFilter refuses.
    """

    def __init__(
        self, d_model, l_max, order=2, filter_order=64, dropout=0.0, filter_dropout=0.0, short_filter_order=3,
        activation="id", bidirectional=False, device=None, dtype=None, **filter_args,
    ):  # fmt: skip
        super().__init__()
        require(self, ("order", order >= 2, ">= 2", order), ("l_max", l_max >= 1, ">= 1", l_max))
        factory = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.l_max = l_max
        self.order = order
        self.bidirectional = bidirectional
        width = (order + 1) * d_model
        self.activation = activation_of(self, "activation", activation)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(d_model, d_model, **factory)
        self.in_proj = nn.Linear(d_model, width, **factory)
        self.short_filter = nn.Conv1d(
            width, width, short_filter_order, groups=width, padding=short_filter_order - 1, **factory
        )
        self.filter_fn = HyenaFilter(
            d_model * (order - 1), order=filter_order, seq_len=l_max, dropout=filter_dropout,
            bidirectional=bidirectional, **filter_args, **factory,
        )  # fmt: skip

    def _filters(self, h):
        """[taps, d_model (order - 1)] -> [order - 1, d_model, taps]"""
        return h.unflatten(-1, (self.d_model, -1)).permute(2, 1, 0)

    def _kernels(self, size):
        taps = min(size[0], self.l_max)
        filters = self._filters(self.filter_fn.filter(taps))
        if not self.bidirectional:
            return [{"k": k} for k in filters]
        after = self._filters(self.filter_fn.filter_rev(taps))
        return [{"k": k, "k_rev": k_rev} for k, k_rev in zip(filters, after, strict=True)]

    def forward(self, u):
        if u.shape[1] == 0:
            return self.out_proj(u)
        x = dwconv_tokens(self.in_proj(u), self.short_filter.weight, self.short_filter.bias)
        *x, v = x.split(self.d_model, dim=-1)
        kernels = self._convolutions(u, u.shape[1])
        bias = self.filter_fn.bias.unflatten(0, (self.d_model, -1)).unbind(-1)
        for i, x_i in enumerate(reversed(x[1:])):
            if self.training and self.dropout.p > 0:
                v, x_i = self.dropout(v * x_i), None
            v = fft_conv(
                v, d=bias[i] if self.filter_fn.use_bias else None, pregate=x_i,
                postgate=x[0] if i == self.order - 2 else None, channels_last=True, **kernels[i],
            )  # fmt: skip
        return self.out_proj(self.activation(v))

    def extra_repr(self):
        return f"d_model={self.d_model}, l_max={self.l_max}, order={self.order}, bidirectional={self.bidirectional}"
