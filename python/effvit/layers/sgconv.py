"""SGConv: structured global convolutions, kernels made of a few coarse ones at growing scales."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import fft_conv, wide
from .hyena import activation_of, require
from .long_conv import FUSED, PointwiseOutput, taps_before


def _norm_of_what_was_loaded(module, incompatible_keys):
    """A state_dict of a layer that was never called has no norm yet."""
    flag = module.kernel_norm_initialized
    if not flag.is_meta and not flag:
        module.kernel_norm = module._norm()
        module.kernel_norm_initialized = torch.ones_like(flag)


class SGConv(PointwiseOutput):
    """SGConv's layer (arXiv:2210.09298): the arguments and the state_dict of the authors' `GConv`.

    u [B, d_model, L] -> [B, d_model, L], with `transposed=False` [B, L, d_model]; any L. The kernel puts S =
    `n_scales` = 1 + ceil(log2(l_max / kernel_dim)) - init_scale learned pieces w_i of `kernel_dim` numbers side by
    side, piece i stretched by 2^(max(0, i - 1) + init_scale), the last ones the loudest::

        k = concat_i interpolate(w_i m^(S - i - 1)) / Z,    y = k * u + D u,    out = W dropout(gelu(y)) + b

    m are `decay_min` .. `decay_max` over the channels, and Z is the norm of the initial kernel of each channel. Beyond
    the last piece k is zero. `channels` > 1 are as many kernels of every channel, whose outputs W takes together.
    `bidirectional=True` has a second kernel, whose tap j is at lag -(j + 1). `linear=True` is y alone. For inference
    `cache_spectra(L)` makes the kernel's transform once.

    `mode`: "cat", or "sum", where pieces start at 0, piece i stretched by 2^(i + init_scale), and add up; "randn" or
    "cos", how they start; with "nearest" steps in place of linear interpolation; with "learnable" k is multiplied by
    (position + 1)^-decay, decay a parameter ("fixed": a constant), in place of m.

    Compared with its formula in plain PyTorch. Names are those of ctlllll/SGConv, gconv_standalone.py at 03de26b, which
    returns a pair with None, computes Z in the first call, and fails with `bidirectional`. A state_dict from before
    that call (`kernel_norm_initialized` is False) has Z computed when it is loaded. hyper_act, ln, initializer
    and weight_norm are not here; dropout is elementwise. d_state and shift do nothing, as there.

    Raises: ValueError for l_max, kernel_dim or channels < 1, sizes that leave no scale, and an unknown mode.
    """

    def __init__(
        self, d_model, d_state=64, l_max=1024, channels=1, bidirectional=False, activation="gelu", postact=None,
        dropout=0.0, transposed=True, shift=False, linear=False, mode="cat_randn", init_scale=0, kernel_dim=64,
        n_scales=None, decay_min=2.0, decay_max=2.0, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        require(
            self,
            ("l_max", l_max >= 1, ">= 1", l_max),
            ("kernel_dim", kernel_dim >= 1, ">= 1", kernel_dim),
            ("channels", channels >= 1, ">= 1", channels),
            ("mode", ("cat" in mode) != ("sum" in mode), "made of 'cat' or 'sum'", repr(mode)),
            ("mode", ("randn" in mode) != ("cos" in mode), "made of 'randn' or 'cos'", repr(mode)),
        )
        scales = 1 + math.ceil(math.log2(l_max / kernel_dim)) - init_scale if n_scales is None else n_scales
        require(self, ("l_max", scales >= 1, f"such that there is a scale of {kernel_dim} taps", l_max))
        factory = {"device": device, "dtype": dtype}
        self.d_model = d_model
        self.l_max = l_max
        self.channels = channels
        self.bidirectional = bidirectional
        self.transposed = transposed
        self.linear = linear
        self.mode = mode
        self.init_scale = init_scale
        self.kernel_dim = kernel_dim
        self.num_scales = scales
        self.D = nn.Parameter(torch.randn(channels, d_model, **factory))
        self.kernel_list = nn.ParameterList(
            self._initial(2 * channels if bidirectional else channels, factory) for _ in range(scales)
        )
        m = torch.tensor(1.0, **factory)
        if "learnable" in mode:
            decay = torch.rand(d_model, **factory) * (decay_max - decay_min) + decay_min
            self.decay = nn.Parameter(decay, requires_grad="fixed" not in mode)
        else:
            m = torch.linspace(decay_min, decay_max, d_model, **factory).view(1, -1, 1)
        self.register_buffer("multiplier", m)
        if not linear:
            self.fused = FUSED.get(activation)
            self.activation = activation_of(self, "activation", activation)
            self.dropout = nn.Dropout(dropout)
            if postact is None:
                self.output_linear = nn.Linear(channels * d_model, d_model, **factory)
            else:
                self.output_linear = self._output_linear(channels * d_model, d_model, postact, factory)
        self.register_buffer("kernel_norm", self._norm())
        self.register_buffer("kernel_norm_initialized", torch.tensor(True, device=device))
        self.register_load_state_dict_post_hook(_norm_of_what_was_loaded)

    @torch.no_grad()
    def _norm(self):
        """[channels, d_model, 1]: the norm of the whole kernel."""
        whole = self._stretched(self.kernel_dim * 2 ** (self.num_scales - 1 + self.init_scale))
        return whole.norm(dim=-1, keepdim=True).to(self.D.dtype)

    def _initial(self, channels, factory):
        if "randn" in self.mode:
            return nn.Parameter(torch.randn(channels, self.d_model, self.kernel_dim, **factory))
        waves = torch.arange(self.d_model, device=factory["device"])[:, None] * torch.linspace(
            0, 2 * math.pi, self.kernel_dim, device=factory["device"]
        )
        order = torch.randperm(self.d_model, device=factory["device"])
        return nn.Parameter(waves.cos()[order].to(self.D.dtype).repeat(channels, 1, 1))

    def _stretched(self, length):
        """The kernel before it is normalised, its first taps, `length` of them or as many as there are."""
        how = "nearest" if "nearest" in self.mode else "linear"
        pieces, total = [], 0
        for i, w in enumerate(self.kernel_list):
            stretch = 2 ** ((i if "sum" in self.mode else max(0, i - 1)) + self.init_scale)
            w = wide(w) * wide(self.multiplier) ** (self.num_scales - i - 1)
            # no more than what the taps up to `length` are interpolated from, and at least one: all get gradients
            w = w[..., : math.ceil(max(length - ("cat" in self.mode) * total, 0) / stretch) + 1]
            pieces.append(F.interpolate(w, scale_factor=float(stretch), mode=how))
            total += pieces[-1].shape[-1]
        if "cat" in self.mode:
            k = torch.cat(pieces, dim=-1)[..., :length]
        else:
            longest = max(p.shape[-1] for p in pieces)
            k = sum(F.pad(p, (0, longest - p.shape[-1])) for p in pieces)[..., :length]
        if "learnable" in self.mode:
            position = torch.arange(1, k.shape[-1] + 1, device=k.device, dtype=k.dtype)
            k = k * position ** -wide(self.decay)[:, None]
        return k

    def kernel(self, L):
        """[channels, d_model, taps]: at most L taps; with `bidirectional` twice as many channels."""
        return self._stretched(L) / wide(self.kernel_norm)

    def _kernels(self, size):
        k, back = self.kernel(*size), None
        if self.bidirectional:
            k, back = k.chunk(2)
        return [{"k": k.flatten(0, 1), "k_rev": None if back is None else taps_before(back.flatten(0, 1))}]

    def forward(self, u):
        u = u if self.transposed else u.mT
        if u.shape[-1] == 0:
            y = u.repeat(1, self.channels, 1) * self.D.flatten().unsqueeze(-1).to(u.dtype)
            y = y if self.linear else self._mix(y.mT).mT
            return y if self.transposed else y.mT
        (kernel,) = self._convolutions(u, u.shape[-1])
        u = u.repeat(1, self.channels, 1) if self.channels > 1 else u
        y = fft_conv(u, d=self.D.flatten(), act="none" if self.linear else self.fused or "none", **kernel)
        if self.linear:
            return y if self.transposed else y.mT
        y = self._mix(self.dropout(y if self.fused else self.activation(y)).mT)
        return y.mT if self.transposed else y

    def extra_repr(self):
        return (
            f"d_model={self.d_model}, l_max={self.l_max}, scales={self.num_scales} of {self.kernel_dim}, "
            f"channels={self.channels}, bidirectional={self.bidirectional}, mode={self.mode!r}"
        )
