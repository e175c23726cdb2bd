"""Activator: a gated linear unit in the place of attention, and its block."""

import torch.nn.functional as F
from torch import nn

from ._ops import glu


class ActivatorGatingUnit(nn.Module):
    """Activator's unit (arXiv:2405.15953): the arguments and the state_dict of the published code.

    x [..., dim] -> the same shape, with u = proj_1(x) and v = proj_2(x)::

        proj_3(LayerNorm(gelu(u)) * LayerNorm(v))        both by the same LayerNorm, as published
        proj_3(v * gelu(u))                              norm=False: GEGLU, gate and product in one pass of effvit.glu

    Compared with Abdullah-88/Activator, activator.py at 631c38a.
    """

    def __init__(self, dim, hidden_dim, norm=True, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.proj_1 = nn.Linear(dim, hidden_dim, **factory)
        self.proj_2 = nn.Linear(dim, hidden_dim, **factory)
        self.proj_3 = nn.Linear(hidden_dim, dim, **factory)
        self.norm = nn.LayerNorm(hidden_dim, **factory) if norm else None

    def forward(self, x):
        u, v = self.proj_1(x), self.proj_2(x)
        if self.norm is None:
            return self.proj_3(glu(v, u, "gelu"))
        return self.proj_3(self.norm(F.gelu(u)) * self.norm(v))


class FeedForward(nn.Module):
    """Two linear layers with GELU: the names of the published code."""

    def __init__(self, dim, hidden_dim, dropout, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.net = nn.Sequential(
            nn.Linear(dim, hidden_dim, **factory),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim, **factory),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.net(x)


class ActivatorBlock(nn.Module):
    """Activator's block: the gating unit, then an MLP, each behind the same LayerNorm and with a residual.

    x [..., d_model] -> the same shape; arguments and state_dict of the published code (`ActivatorGatingUnit`, which see
    for the commit and for `norm`). `ffn=False` leaves the MLP out, as activator_only_GEGLU.py there.
    """

    def __init__(self, d_model, d_ffn, dropout=0.0, ffn=True, norm=True, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(d_model, **factory)
        self.actgu = ActivatorGatingUnit(d_model, d_ffn, norm, **factory)
        self.ffn = FeedForward(d_model, d_ffn, dropout, **factory) if ffn else None

    def forward(self, x):
        x = x + self.actgu(self.norm(x))
        return x if self.ffn is None else x + self.ffn(self.norm(x))
