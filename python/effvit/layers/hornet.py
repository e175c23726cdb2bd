"""HorNet's recursive gated convolution: the depthwise convolution and its first gate in one pass, channels last."""

import torch
from torch import nn

from ._ops import dwconv_glu
from ._tokens import convolve, is_hooked


class GnConv(nn.Module):
    """HorNet's recursive gated convolution (arXiv:2207.14284), a drop-in for `gnconv` of its code.

    Same arguments, same state_dict, same `forward(x[B, dim, H, W])`. dims are dim / 2^(order - 1), .., dim / 2, dim::

        p, a_0, .., a_(order - 1) = split(proj_in(x))      (p of dims[0] channels, a_i of dims[i])
        a = s * dwconv(a);    x = p * a_0;    x = pws_i(x) * a_(i + 1);    out = proj_out(x)

    The map is made channels last where it is not, and so is the result. `gflayer(sum(dims), h=h, w=w)` stands in for
    the 7 x 7 convolution, as in the original, and runs as it is. `mask` and `dummy` are accepted and do nothing.

    Compared with raoyongming/HorNet, hornet.py at 5e55273. Difference: nothing is printed.
    """

    def __init__(self, dim, order=5, gflayer=None, h=14, w=8, s=1.0, device=None, dtype=None):
        super().__init__()
        if order < 1:
            raise ValueError(f"effvit::GnConv: order must be at least 1, got {order}")
        if dim % 2 ** (order - 1):
            raise ValueError(f"effvit::GnConv: dim must be a multiple of 2^(order - 1) = {2 ** (order - 1)}, got {dim}")
        factory = {"device": device, "dtype": dtype}
        self.order = order
        self.dims = [dim // 2**i for i in reversed(range(order))]
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1, **factory)
        total = sum(self.dims)
        if gflayer is None:
            self.dwconv = nn.Conv2d(total, total, 7, padding=3, groups=total, **factory)
        else:
            self.dwconv = gflayer(total, h=h, w=w)
        self.proj_out = nn.Conv2d(dim, dim, 1, **factory)
        self.pws = nn.ModuleList(
            [nn.Conv2d(a, b, 1, **factory) for a, b in zip(self.dims, self.dims[1:], strict=False)]
        )
        self.scale = s

    def _convolve_and_gate(self, x):
        """[B, 2 dim, H, W] -> p * a_0 and all other a_i, [B, sum(dims), H, W], by the operator where it applies."""
        conv = self.dwconv
        plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not is_hooked(conv)
        if plain and conv.weight.shape[1:] == (1, 7, 7) and conv.padding == (3, 3) and conv.stride == (1, 1):
            bias = None if conv.bias is None else conv.bias * self.scale
            y = dwconv_glu(x.permute(0, 2, 3, 1), None, conv.weight * self.scale, bias, act="none", gate_first=True)
            return y.permute(0, 3, 1, 2)
        p, a = x.split((self.dims[0], sum(self.dims)), dim=1)
        a = convolve(conv, a) * self.scale
        return torch.cat((p * a[:, : self.dims[0]], a[:, self.dims[0] :]), dim=1)

    def forward(self, x, mask=None, dummy=False):
        """x [B, dim, H, W] -> [B, dim, H, W], channels last."""
        x = convolve(self.proj_in, x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))  # channels last, in vmap too
        x, *gates = self._convolve_and_gate(x).split(self.dims, dim=1)
        for pw, gate in zip(self.pws, gates, strict=True):
            x = convolve(pw, x) * gate
        return convolve(self.proj_out, x)

    def extra_repr(self):
        return f"order={self.order}, dims={self.dims}, s={self.scale:g}"
