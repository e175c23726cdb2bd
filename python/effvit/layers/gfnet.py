"""GFNet's global filter, and the block that GFNet and SpectFormer build of it."""

import math

import torch
from torch import nn

from ._ops import spectral_gate
from .swin_block import DropPath, Mlp


class GlobalFilter(nn.Module):
    """GFNet's global filter (arXiv:2107.00645), a drop-in for its class and for SpectFormer's `SpectralGatingNetwork`.

    Same arguments, same state_dict, same `forward(x[B, N, dim], spatial_size)`::

        irfft2(rfft2(x) * complex_weight)

    of the map of `spatial_size` (a, b), by default a square one. `complex_weight` [h, w, dim, 2] is that of maps of h
    rows and 2 w - 2 or 2 w - 1 columns.

    Compared with raoyongming/GFNet, gfnet.py at 4669790, and badripatro/SpectFormers,
    vanilla_architecture/spectformer.py at 9f2f100. Difference: the result has the dtype of x; theirs is float32. Both
    compute in float32.
    """

    def __init__(self, dim, h=14, w=8, device=None, dtype=None):
        super().__init__()
        self.h = h
        self.w = w
        self.complex_weight = nn.Parameter(torch.randn(h, w, dim, 2, device=device, dtype=dtype) * 0.02)

    def forward(self, x, spatial_size=None):
        """x [B, N, dim], of a map of `spatial_size` with N positions -> [B, N, dim]."""
        N = x.shape[1]
        a, b = spatial_size or (math.isqrt(N),) * 2
        if a * b != N:
            given = "a square map" if spatial_size is None else f"a map of {a} x {b}"
            raise ValueError(f"effvit::GlobalFilter: x must be [B, N, C] of {given}, got {list(x.shape)}")
        if (a, b // 2 + 1) != (self.h, self.w):
            wide = f"{2 * self.w - 2} or {2 * self.w - 1}"
            raise ValueError(f"effvit::GlobalFilter: x must be a map of {self.h} x {wide}, got {a} x {b}")
        return spectral_gate(x.unflatten(1, (a, b)), self.complex_weight).flatten(1, 2)

    def extra_repr(self):
        return f"{self.complex_weight.shape[2]}, h={self.h}, w={self.w}"


class SpectFormerBlock(nn.Module):
    """The spectral block of SpectFormer (arXiv:2304.06446) and of GFNet, a drop-in for `Block` of their code.

    Same arguments, same state_dict; `forward(x[B, N, dim])`, for maps that are not square with `spatial_size`::

        x + mlp(norm2(filter(norm1(x))))

    `init_values` makes it GFNet's `BlockLayerScale`: the branch is multiplied with `gamma` [dim], at first that number.

    Compared with raoyongming/GFNet, gfnet.py at 4669790, and badripatro/SpectFormers,
    vanilla_architecture/spectformer.py at 9f2f100. SpectFormer's other blocks are those of a plain ViT.
    """

    def __init__(
        self, dim, mlp_ratio=4.0, drop=0.0, drop_path=0.0, act_layer=nn.GELU, norm_layer=nn.LayerNorm, h=14, w=8,
        init_values=None, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **factory)
        self.filter = GlobalFilter(dim, h, w, **factory)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, drop, **factory)
        gamma = None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values), **factory))
        self.register_parameter("gamma", gamma)

    def forward(self, x, spatial_size=None):
        """x [B, N, dim] -> [B, N, dim]."""
        y = self.mlp(self.norm2(self.filter(self.norm1(x), spatial_size)))
        return x + self.drop_path(y if self.gamma is None else self.gamma * y)
