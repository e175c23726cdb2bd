"""SVT: scattering in the dual-tree complex wavelet transform, gated low frequencies and mixed channels of high ones."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from ._depthwise import depthwise
from ._ops import wide
from .swin_block import DropPath
from .transnext import DWConv
from .window_attention import pair

# Kingsbury's near-symmetric filters of 13 and 19 taps (near_sym_b), the first half, times 1146880: they are fractions.
# Synthesis filters are those of the other band with every second sign changed.
_UNIT = 1146880
_LOW = (-2016, 0, 25536, -53760, -55328, 340480, 637056)
_HIGH = (-81, 0, 1539, -2160, -8208, 27360, 63816, -59280, -343786, 641600)


def _taps(half, alternate):
    """All taps of a symmetric filter of odd length; alternate: every second sign changed, that in the middle kept."""
    half = [t * (-1) ** (len(half) - 1 - i) if alternate else t for i, t in enumerate(half)]
    return [*half, *half[-2::-1]]


def _matrix(n, taps):
    """[n, n]: a filter on n values that are mirrored, the last ones repeated, beyond their ends."""
    rows = [[0] * n for _ in range(n)]
    for i, row in enumerate(rows):
        for j, tap in enumerate(taps):
            at = (i + j - len(taps) // 2) % (2 * n)
            row[min(at, 2 * n - 1 - at)] += tap
    return rows


def _bank(n):
    """Integers: analysis [2n, n], low above high, and synthesis [n, 2n] of one axis, both times _UNIT."""
    analysis = _matrix(n, _taps(_LOW, False)) + _matrix(n, _taps(_HIGH, False))
    low, high = _matrix(n, _taps(_HIGH, True)), _matrix(n, _taps(_LOW, True))
    return analysis, [a + b for a, b in zip(low, high, strict=True)]


def _along_both(x, rows, columns):
    """rows [P, H] and columns [Q, W] on a map x [B, H, W, C] -> [B, P, Q, C]."""
    x = (rows @ x.flatten(2)).unflatten(2, (-1, x.shape[3]))
    return columns @ x


def _to_complex(band):
    """A real band [B, 2h, 2w, C] -> two complex ones, each (real, imaginary) [B, h, w, C], of opposite orientation."""
    band = band.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)) * 0.5**0.5
    (a, b), (c, d) = (t.unbind(3) for t in band.unbind(2))
    return (a - d, b + c), (a + d, b - c)


def _to_real(first, second):
    """The inverse of `_to_complex`."""
    (r, i), (s, j) = first, second
    band = torch.stack((torch.stack((r + s, i + j), 3), torch.stack((i - j, s - r), 3)), 2) * 0.5**0.5
    return band.flatten(3, 4).flatten(1, 2)


class DTCWT(nn.Module):
    """The first level of the dual-tree complex wavelet transform, near_sym_b, of maps [B, H, W, C] of one even size.

    `forward(x)` -> (low [B, H, W, C], real, imaginary [B, 6, H/2, W/2, C]), orientations 15, 45, 75, 105, 135 and 165
    degrees; `inverse(low, real, imaginary)` -> x. What DTCWTForward(J=1) and DTCWTInverse of pytorch_wavelets compute,
    as products with matrices, and with exact gradients (theirs take the mirrored border for its own transpose). In
    float32, float64 for float64. ValueError where a size is odd.
    """

    def __init__(self, size, device=None):
        super().__init__()
        self.size = pair(size)
        for axis, n in zip(("rows", "columns"), self.size, strict=True):
            if n < 2 or n % 2:
                raise ValueError(f"effvit::DTCWT: size must be two even numbers, got {self.size}")
            for name, entries in zip(("analysis", "synthesis"), _bank(n), strict=True):
                # Integers: a cast of the module does not round them.
                filters = torch.tensor(entries, dtype=torch.int32, device=device)
                self.register_buffer(f"{name}_{axis}", filters, persistent=False)

    def _filters(self, name, dtype):
        return [(getattr(self, f"{name}_{axis}").double() / _UNIT).to(dtype) for axis in ("rows", "columns")]

    def forward(self, x):
        H, W = self.size
        y = _along_both(wide(x), *self._filters("analysis", wide(x).dtype))
        (low, wide_high), (tall_high, both) = (t.split(W, 2) for t in y.split(H, 1))
        (z15, z165), (z45, z135), (z75, z105) = (_to_complex(t) for t in (tall_high, both, wide_high))
        real, imaginary = zip(z15, z45, z75, z105, z135, z165, strict=True)
        return low, torch.stack(real, 1), torch.stack(imaginary, 1)

    def inverse(self, low, real, imaginary):
        z = list(zip(real.unbind(1), imaginary.unbind(1), strict=True))
        tall_high, both, wide_high = _to_real(z[0], z[5]), _to_real(z[1], z[4]), _to_real(z[2], z[3])
        y = torch.cat((torch.cat((low, wide_high), 2), torch.cat((tall_high, both), 2)), 1)
        return _along_both(y, *self._filters("synthesis", y.dtype))

    def extra_repr(self):
        return f"size={self.size}"


class ScatteringChannelMixing(nn.Module):
    """SVT's spectral mixing (arXiv:2311.01310), a drop-in for `SVT_channel_mixing` of its code.

    x [B, H*W, dim], H, W -> [B, H*W, dim]. The low band of the `DTCWT` is multiplied with `complex_weight_ll`
    [dim, H, W] (real); every number z of the six complex bands goes through two layers of `num_blocks` groups of
    channels, with products of complex numbers and relu on real and imaginary parts::

        z = relu(z W1 + b1) W2 + b2        (W [2, blocks, d, d], b [2, blocks, d]: real, imaginary)

    and back. `size` is that of the map (an int or two, even; by default what the original knows for its dims). In
    float32; the result has the dtype of x. ValueError where dim is not a multiple of num_blocks, no size is known for
    it, or the map has another one.

    Compared with badripatro/svt, svt.py at fcbc9b3. Differences: any dim and size, exact gradients at the border, and
    the wavelets' filters are no parameters: those of a state_dict (`xfm.`, `ifm.`) are dropped when it is loaded.
    """

    SIZES = {64: 56, 96: 56, 128: 28, 192: 28}

    def __init__(self, dim, size=None, num_blocks=4, device=None, dtype=None):
        super().__init__()
        name = "effvit::ScatteringChannelMixing"
        if dim % num_blocks:
            raise ValueError(f"{name}: dim must be a multiple of num_blocks {num_blocks}, got {dim}")
        size = self.SIZES.get(dim) if size is None else size
        if size is None:
            raise ValueError(f"{name}: size must be given for dim {dim}, got None")
        self.hidden_size = dim
        self.num_blocks = num_blocks
        self.block_size = d = dim // num_blocks
        self.xfm = DTCWT(size, device)

        def normal(*shape):
            return nn.Parameter(torch.randn(*shape, device=device, dtype=dtype) * 0.02)

        self.complex_weight_ll = normal(dim, *self.xfm.size)
        self.complex_weight_lh_1 = normal(2, num_blocks, d, d)
        self.complex_weight_lh_2 = normal(2, num_blocks, d, d)
        self.complex_weight_lh_b1 = normal(2, num_blocks, d)
        self.complex_weight_lh_b2 = normal(2, num_blocks, d)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):  # fmt: skip
        for part in ("xfm", "ifm"):
            for name in [k for k in state_dict if k.startswith(f"{prefix}{part}.")]:
                del state_dict[name]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )  # fmt: skip

    def _layer(self, z, weight, bias):
        """z [.., blocks, 2d], real and imaginary parts, times a complex matrix, plus a complex bias."""
        re, im = wide(weight).to(z.dtype)
        matrix = torch.cat((torch.cat((re, im), -1), torch.cat((-im, re), -1)), -2)
        return torch.einsum("...bd,bdk->...bk", z, matrix) + torch.cat(wide(bias).to(z.dtype).unbind(0), -1)

    def forward(self, x, H, W):
        if (H, W) != self.xfm.size or x.shape[1] != H * W or x.shape[2] != self.hidden_size:
            (h, w), name = self.xfm.size, "effvit::ScatteringChannelMixing"
            expected = f"[B, {h * w}, {self.hidden_size}] of a map {h} x {w}"
            raise ValueError(f"{name}: x must be {expected}, got {list(x.shape)}, {H} x {W}")
        device = x.device.type
        off = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with off:
            low, real, imaginary = self.xfm(x.unflatten(1, (H, W)))
            low = low * self.complex_weight_ll.permute(1, 2, 0)
            blocks = (self.num_blocks, self.block_size)
            z = torch.cat((real.unflatten(-1, blocks), imaginary.unflatten(-1, blocks)), -1)
            z = F.relu(self._layer(z, self.complex_weight_lh_1, self.complex_weight_lh_b1))
            z = self._layer(z, self.complex_weight_lh_2, self.complex_weight_lh_b2)
            real, imaginary = (t.flatten(-2) for t in z.chunk(2, dim=-1))
            return self.xfm.inverse(low, real, imaginary).flatten(1, 2).to(x.dtype)

    def extra_repr(self):
        return f"dim={self.hidden_size}, num_blocks={self.num_blocks}"


class PVT2FFN(nn.Module):
    """PVT v2's feed-forward layer: linear, depthwise 3 x 3, GELU, linear; x [B, H*W, in_features], H, W."""

    def __init__(self, in_features, hidden_features, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(in_features, hidden_features, **factory)
        self.dwconv = DWConv(hidden_features, **factory)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_features, in_features, **factory)

    def forward(self, x, H, W):
        x = self.fc1(x)
        if self.dwconv.is_plain() and type(self.act) is nn.GELU and self.act.approximate == "none":
            x = depthwise(self.dwconv.dwconv, x.unflatten(1, (H, W)), act="gelu").flatten(1, 2)
        else:
            x = self.act(self.dwconv(x, H, W))
        return self.fc2(x)


class ScatteringBlock(nn.Module):
    """SVT's block (arXiv:2311.01310), `Block` of its code with block_type "scatter": x [B, H*W, dim], H, W -> the same.

    x + attn(norm1(x)), x + mlp(norm2(x)), with `ScatteringChannelMixing` and PVT v2's feed-forward layer (the operator
    with GELU in its pass). state_dict as there; `num_heads` and `sr_ratio` are accepted and unused, as there.

    Compared with badripatro/svt, svt.py at fcbc9b3; see `ScatteringChannelMixing`.
    """

    def __init__(
        self, dim, num_heads=None, mlp_ratio=4.0, drop_path=0.0, norm_layer=nn.LayerNorm, sr_ratio=1, size=None,
        num_blocks=4, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **factory)
        self.norm2 = norm_layer(dim, **factory)
        self.attn = ScatteringChannelMixing(dim, size, num_blocks, **factory)
        self.mlp = PVT2FFN(dim, int(dim * mlp_ratio), **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x, H, W):
        x = x + self.drop_path(self.attn(self.norm1(x), H, W))
        return x + self.drop_path(self.mlp(self.norm2(x), H, W))
