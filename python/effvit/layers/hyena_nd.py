"""Hyena N-D: Hyena on maps, with an implicit filter in two dimensions."""

import math

import torch
from torch import nn

from ._ops import dwconv, fft_conv
from ._spectra import CachedSpectra
from .hyena import FilterPositions, frequencies, implicit_filter, parameter_or_buffer, require, without_autocast

WINDOWS = ("standard", "learn", "symettric", "no")  # spelled as in the authors' code
DIRECTIONS = ("standard", "seq", "4dir", "4dirp")


class Window(nn.Module):
    """What the taps are multiplied with: an exponential decay per channel, plus `shift`.

    One axis (`joint=False`): exp(-t |deltas|). Both: exp(-t_y |Xdeltas| - t_x |Ydeltas|), or with "symettric"
    exp(-(y + x) |deltas|) of whole positions; its square root with `sqrt_decay`.
    """

    def __init__(self, dim, mode, joint, fast, slow, target, shift, sqrt_decay, device=None, dtype=None):
        super().__init__()
        self.mode = mode
        self.joint = joint
        self.sqrt_decay = sqrt_decay
        factory = {"device": device, "dtype": dtype}
        learned = mode in ("learn", "symettric")
        deltas = torch.linspace(math.log(target) / slow, math.log(target) / fast, dim, dtype=torch.float64)[None, None]
        names = ("Xdeltas", "Ydeltas") if joint and mode != "symettric" else ("deltas",)
        for name in names if mode != "no" else ():
            parameter_or_buffer(self, name, deltas, learned, **factory)
        if learned:
            self.shift = nn.Parameter(torch.rand(1, 1, dim, **factory))
        else:
            self.shift = shift

    def forward(self, h, t, t_x=None):
        """h [1, n, dim] and t [1, n, 1]; or h [1, H, W, dim], t of the rows and t_x of the columns."""
        if self.mode == "no":
            return h
        if not self.joint:
            decay = torch.exp(-t * self.deltas.abs())
        elif self.mode == "symettric":
            rows, columns = (torch.arange(n, device=h.device, dtype=h.dtype) for n in h.shape[1:3])
            decay = torch.exp(-(rows[:, None, None] + columns[:, None]) * self.deltas[0, 0].abs())[None]
        else:
            decay = torch.exp(-t * self.Xdeltas.abs())[:, :, None] * torch.exp(-t_x * self.Ydeltas.abs())[:, None]
        return h * ((decay**0.5 if self.sqrt_decay else decay) + self.shift)


class HyenaFilter2d(nn.Module):
    """Hyena N-D's implicit filter: `filter2d(H, W)` -> [H, W, d_model], H and W up to seq_len.

    An outer product h_y h_x of two filters of one axis, or with `hyena2d_filter` one MLP of both positions. State_dict
    of the authors' `HyenaFilter2d`; computed in the dtype of the parameters, under autocast too.
    """

    def __init__(
        self, d_model, emb_dim=3, order=16, seq_len=1024, lr_pos_emb=1e-5, dropout=0.0, w=1, window_mode="standard",
        num_inner_mlps=2, hyena2d_filter=False, fast_decay_pct=0.3, slow_decay_pct=1.5, target=1e-2, shift=0.0,
        sqrt_decay=False, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        require(
            self,
            ("emb_dim", emb_dim >= 3 and emb_dim % 2 == 1, "odd and at least 3 (time, sines and cosines)", emb_dim),
            ("window_mode", window_mode in WINDOWS, f"one of {WINDOWS}", repr(window_mode)),
            ("window_mode", hyena2d_filter or window_mode != "symettric", "another for one axis", window_mode),
        )
        factory = {"device": device, "dtype": dtype}
        self.hyena2d_filter = hyena2d_filter
        self.bias = nn.Parameter(torch.randn(d_model, **factory))
        self.pos_emb = FilterPositions(emb_dim, seq_len, lr_pos_emb != 0, **factory)
        freq = frequencies(order, w, **factory)
        window = (window_mode, hyena2d_filter, fast_decay_pct, slow_decay_pct, target, shift, sqrt_decay)
        for axis in ("",) if hyena2d_filter else ("Y", "X"):
            inputs = 2 * emb_dim if hyena2d_filter else emb_dim
            mlp = implicit_filter(inputs, order, d_model, num_inner_mlps, freq, factory)
            setattr(self, f"{axis}implicit_filter", mlp)
            setattr(self, f"{axis}modulation", Window(d_model, *window, **factory))

    def filter2d(self, H, W):
        """[H, W, d_model]: taps at lags 0 .. H - 1 of the rows and 0 .. W - 1 of the columns."""
        z, t = self.pos_emb.z, self.pos_emb.t
        with without_autocast(self.bias):
            if not self.hyena2d_filter:
                rows = self.Xmodulation(self.Ximplicit_filter(z[:, :H]), t[:, :H])
                columns = self.Ymodulation(self.Yimplicit_filter(z[:, :W]), t[:, :W])
                return rows[0, :, None] * columns[0, None]
            grid = (z[:, :H, None].expand(-1, -1, W, -1), z[:, None, :W].expand(-1, H, -1, -1))
            return self.modulation(self.implicit_filter(torch.cat(grid, dim=-1)), t[:, :H], t[:, :W])[0]


def _augment(x):
    """[B, H, W, C] -> [4B, H, W, C]: as it is, both axes reversed, the columns, the rows."""
    return torch.cat((x, x.flip(1, 2), x.flip(2), x.flip(1)), dim=0)


class HyenaND(CachedSpectra):
    """Hyena N-D's layer on maps (arXiv:2309.13600): the state_dict of the authors' `HyenaOperator2d`.

    u [B, H, W, d_model], or tokens [B, N, d_model] of a square map -> the same shape. As `HyenaOperator`, with a 3 x 3
    depthwise convolution in place of the causal one and convolutions in two dimensions, causal in both::

        x_0, .., x_(order - 1), v = split(short_filter(in_proj(u)))
        v = s h_i * (v x_i) + D_i v x_i    for i = order - 1, .., 1
        out = out_proj(v x_0)

    The filter has l_max x l_max taps: an outer product of two implicit filters, with `hyena2d_filter` one joint filter,
    or with `direct_paramtrization` learned numbers. `window_mode` is "standard" (fixed decays), "learn", "symettric"
    (one decay for both axes, of the joint filter) or "no".

    `directional_mode`: "standard"; "seq", where the first convolution runs from the last row and column backwards;
    "4dir", where the recurrence runs in all four directions, x as well reversed, and `linear_mix` mixes them, one
    number each; "4dirp", mixed with their channels.

    `kernel_scale` is s: None is 1 / (2 l_max), because the authors' code divides the filter's transform by 2 l_max and
    then uses the full inverse; 1.0 is the convolution itself. Maps may have any size: of a smaller one fewer taps are
    computed, a larger one is convolved with l_max x l_max of them (the authors' code takes l_max x l_max alone).
    For inference `cache_spectra(H, W)` makes the filters' transforms once.

    Compared with its formula in plain PyTorch; names are those of the authors' standalone code. Its directional_mode
    "parallel" is not here, and `filter_args` are those of `HyenaFilter2d`: emb_dim, w, num_inner_mlps, sqrt_decay, ...

    Raises: ValueError for order < 2, l_max < 1, an unknown mode, or tokens of a map that is not square.
    """

    def __init__(
        self, d_model, l_max, order=2, filter_order=64, dropout=0.0, filter_dropout=0.0, hyena2d_filter=False,
        direct_paramtrization=False, window_mode="standard", directional_mode="standard", kernel_scale=None,
        device=None, dtype=None, **filter_args,
    ):  # fmt: skip
        super().__init__()
        require(
            self,
            ("order", order >= 2, ">= 2", order),
            ("l_max", l_max >= 1, ">= 1", l_max),
            ("directional_mode", directional_mode in DIRECTIONS, f"one of {DIRECTIONS}", repr(directional_mode)),
        )
        factory = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.l_max = l_max
        self.order = order
        self.directional_mode = directional_mode
        self.direct_paramtrization = direct_paramtrization
        self.kernel_scale = 1 / (2 * l_max) if kernel_scale is None else kernel_scale
        if directional_mode == "4dir":
            self.linear_mix = nn.Linear(4, 1, **factory)
        elif directional_mode == "4dirp":
            self.linear_mix = nn.Linear(4 * d_model, d_model, **factory)
        width = (order + 1) * d_model
        self.dropout = nn.Dropout(dropout)
        self.in_proj = nn.Linear(d_model, width, **factory)
        self.out_proj = nn.Linear(d_model, d_model, **factory)
        self.short_filter = nn.Conv2d(width, width, 3, padding=1, groups=width, **factory)
        if direct_paramtrization:
            self.filter = nn.Parameter(torch.randn(order, d_model, l_max, l_max, **factory))
            self.bias = nn.Parameter(torch.randn(order, d_model, **factory))
        else:
            self.filter_fn = HyenaFilter2d(
                d_model * (order - 1), order=filter_order, seq_len=l_max, dropout=filter_dropout,
                hyena2d_filter=hyena2d_filter, window_mode=window_mode, **filter_args, **factory,
            )  # fmt: skip

    def filters(self, H, W):
        """[order - 1, d_model, H, W]: taps for maps of H x W, l_max x l_max at most."""
        if self.direct_paramtrization:
            return self.filter[: self.order - 1, :, :H, :W]
        h = self.filter_fn.filter2d(min(H, self.l_max), min(W, self.l_max))
        return h.permute(2, 0, 1).unflatten(0, (self.order - 1, self.d_model))

    def _kernels(self, size):
        return [{"k": k, "kernel_scale": self.kernel_scale} for k in self.filters(*size)]

    def _biases(self):
        if self.direct_paramtrization:
            return self.bias[: self.order - 1]
        return self.filter_fn.bias.unflatten(0, (self.order - 1, self.d_model))

    def forward(self, u):
        if u.shape[1] == 0 or (u.dim() == 4 and u.shape[2] == 0):
            return self.out_proj(u)
        if u.dim() == 3:
            side = math.isqrt(u.shape[1])
            if side * side != u.shape[1]:
                raise ValueError(
                    f"effvit::HyenaND: u must be [B, H, W, C], or [B, N, C] with a square N, got {[*u.shape]}"
                )
            return self.forward(u.unflatten(1, (side, side))).flatten(1, 2)
        x = dwconv(self.in_proj(u), self.short_filter.weight, self.short_filter.bias)
        *x, v = x.split(self.d_model, dim=-1)
        everywhere = self.directional_mode in ("4dir", "4dirp")
        if everywhere:
            *x, v = (_augment(t) for t in (*x, v))
        kernels, bias = self._convolutions(u, *u.shape[1:3]), self._biases()
        for i, x_i in enumerate(reversed(x[1:])):
            gate = x[0] if i == self.order - 2 else None
            backwards = self.directional_mode == "seq" and i == 0
            if backwards:
                v, x_i, gate = (t if t is None else t.flip(1, 2) for t in (v, x_i, gate))
            if self.training and self.dropout.p > 0:
                v, x_i = self.dropout(v * x_i), None
            v = fft_conv(v, d=bias[i], pregate=x_i, postgate=gate, channels_last=True, **kernels[i])
            v = v.flip(1, 2) if backwards else v
        return self.out_proj(self._mix(v) if everywhere else v)

    def _mix(self, y):
        """[4B, H, W, C] -> [B, H, W, C]"""
        y, both, columns, rows = y.chunk(4)
        y = torch.stack((y, both.flip(1, 2), columns.flip(2), rows.flip(1)), dim=-1)
        return self.linear_mix(y).squeeze(-1) if self.directional_mode == "4dir" else self.linear_mix(y.flatten(-2))

    def extra_repr(self):
        return f"d_model={self.d_model}, l_max={self.l_max}, order={self.order}, mode={self.directional_mode!r}"
