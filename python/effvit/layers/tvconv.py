"""TVConv: a depthwise convolution whose taps differ from position to position, made of maps that are learnt."""

import torch
import torch.nn.functional as F
from torch import nn

from ._ops import wide
from ._tokens import convolve


class _ConvBlock(nn.Sequential):
    """3 x 3 convolution, LayerNorm over the whole map, ReLU; TVConv's parameter names."""

    def __init__(self, in_planes, out_planes, h, w, factory):
        super().__init__(
            nn.Conv2d(in_planes, out_planes, 3, padding=1, bias=False, **factory),
            nn.LayerNorm([out_planes, h, w], **factory),
            nn.ReLU(),
        )

    def forward(self, x):
        conv, norm, act = self
        return act(norm(convolve(conv, x)))


class TVConv(nn.Module):
    """Translation-variant depthwise convolution (arXiv:2203.10489), a drop-in for its class.

    x [B, channels, H, W] -> [B, channels, h, w], channels last; h x w is the size of the result, H x W one of which a
    convolution of TVConv_k x TVConv_k taps (odd), padding TVConv_k // 2 and this stride makes it::

        out[b, c, y, x] = sum_ij weight[c, i, j, y, x] x[b, c, stride y + i - k // 2, stride x + j - k // 2] + bias

    weight, and bias [channels, h, w] with TVConv_Bias, do not depend on x: small convolutional networks make them of
    `posi_map` [1, TVConv_posi_chans, h, w]. `reparameterize()` computes them once and for all, for evaluation.
    Sums are in float32, and no copy of x is made for every tap. It runs in PyTorch on every device.

    ValueError where TVConv_k is even or x has another size.

    Compared with JierunChen/TVConv, face_recognition/model/atoms/TVConv.py at 609d4bf, also its state_dict: the numbers
    among its buffers are checked when they are loaded. Other keywords are accepted and unused, as there.
    """

    _NUMBERS = ("TVConv_k", "TVConv_k_square", "stride", "channels", "h", "w")

    def __init__(
        self, channels, TVConv_k=3, stride=1, TVConv_posi_chans=4, TVConv_inter_chans=16, TVConv_inter_layers=1,
        TVConv_Bias=False, h=3, w=3, device=None, dtype=None, **kwargs,
    ):  # fmt: skip
        super().__init__()
        if TVConv_k % 2 == 0:
            raise ValueError(f"effvit::TVConv: TVConv_k must be odd, got {TVConv_k}")
        factory = {"device": device, "dtype": dtype}
        self.size, self.taps, self.step, self.width = (h, w), TVConv_k, stride, channels
        for name, value in zip(self._NUMBERS, (TVConv_k, TVConv_k**2, stride, channels, h, w), strict=True):
            self.register_buffer(name, torch.tensor(value, device=device))
        self.posi_map = nn.Parameter(torch.ones(1, TVConv_posi_chans, h, w, **factory))
        planes = (TVConv_posi_chans, *[TVConv_inter_chans] * (TVConv_inter_layers + 1))
        self.weight_layers = self._layers(planes, TVConv_k**2 * channels, factory)
        self.bias_layers = self._layers(planes, channels, factory) if TVConv_Bias else None

    def _layers(self, planes, out, factory):
        blocks = [_ConvBlock(a, b, *self.size, factory) for a, b in zip(planes, planes[1:], strict=False)]
        return nn.Sequential(*blocks, nn.Conv2d(planes[-1], out, 3, padding=1, bias=False, **factory))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):  # fmt: skip
        numbers = (self.taps, self.taps**2, self.step, self.width, *self.size)
        for name, own in zip(self._NUMBERS, numbers, strict=True):
            value = state_dict.get(prefix + name)
            if value is not None and not value.is_meta and int(value) != own:
                error_msgs.append(f"effvit::TVConv: {prefix}{name} must be {own}, got {int(value)}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip

    def maps(self):
        """(weight [taps, h, w, channels], bias [h, w, channels] or None)."""
        if hasattr(self, "weight_maps"):
            return self.weight_maps, getattr(self, "bias_maps", None)
        weight = self._make(self.weight_layers).unflatten(0, (self.width, -1)).permute(1, 2, 3, 0)
        bias = None if self.bias_layers is None else self._make(self.bias_layers).permute(1, 2, 0)
        return weight, bias

    def _make(self, layers):
        y = self.posi_map
        for block in layers[:-1]:
            y = block(y)
        return convolve(layers[-1], y).squeeze(0)

    @torch.no_grad()
    def reparameterize(self):
        """Keeps the maps as buffers in place of what makes them; nothing where that has been done."""
        if hasattr(self, "weight_maps"):
            return
        weight, bias = self.maps()
        self.register_buffer("weight_maps", weight.contiguous())
        if bias is not None:
            self.register_buffer("bias_maps", bias.contiguous())
        del self.posi_map, self.weight_layers, self.bias_layers

    def forward(self, x):
        (h, w), k, s = self.size, self.taps, self.step
        H, W = x.shape[2:]
        if x.shape[1] != self.width or ((H - 1) // s + 1, (W - 1) // s + 1) != self.size:
            expected = f"[B, {self.width}, H, W] of which stride {s} makes {h} x {w}"
            raise ValueError(f"effvit::TVConv: x must be {expected}, got {list(x.shape)}")
        weight, bias = self.maps()
        r = k // 2
        padded = wide(F.pad(x.permute(0, 2, 3, 1), (0, 0, r, r, r, r)))
        weight = weight.to(padded.dtype)
        y = 0 if bias is None else bias.to(padded.dtype)
        for tap in range(k * k):
            i, j = divmod(tap, k)
            y = y + padded[:, i : i + s * (h - 1) + 1 : s, j : j + s * (w - 1) + 1 : s] * weight[tap]
        return y.to(x.dtype).permute(0, 3, 1, 2)

    def extra_repr(self):
        return f"channels={self.width}, TVConv_k={self.taps}, stride={self.step}, size={self.size}"
