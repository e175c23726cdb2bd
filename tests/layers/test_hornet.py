"""effvit.layers.GnConv against HorNet's recursion with plain convolutions."""

import pytest
import torch
import torch.nn.functional as F
from layer_suite import DTYPES, check, check_everything_else, randomise, tokens
from torch import nn

from effvit.layers import GnConv

H, W = 6, 9


def plain(m, x):
    """p * a_0, then a projection and the next gate, order - 1 times."""
    p, a = m.proj_in(x).split((m.dims[0], sum(m.dims)), dim=1)
    a = m.dwconv(a) * m.scale
    first = 0
    x = p
    for i, dim in enumerate(m.dims):
        x = (m.pws[i - 1](x) if i else x) * a[:, first : first + dim]
        first += dim
    return m.proj_out(x)


class Shifts(nn.Module):
    """What may stand in for the convolution."""

    def __init__(self, dim, h, w):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim, 1, 1), h / w))

    def forward(self, x):
        return self.scale * F.pad(x, (0, 0, 1, 0))[:, :, :-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order, s", [(1, 1.0), (2, 1.0), (4, 1 / 3)])
def test_like_the_formula(order, s, dtype):
    m = randomise(GnConv(32, order, s=s)).to(dtype)
    check(m, plain, tokens(2, 32, H, W, dtype=dtype), is_map=True)


def test_another_layer_in_place_of_the_convolution():
    m = GnConv(16, 3, gflayer=Shifts, h=3, w=2, s=0.5)
    check(m, plain, tokens(2, 16, H, W), is_map=True)


def test_a_hook_on_the_convolution_is_called():
    m, seen = randomise(GnConv(16, 2)), []
    m.dwconv.register_forward_hook(lambda *_: seen.append(1))
    check(m, plain, tokens(1, 16, H, W), is_map=True)
    assert seen


def test_everything_else():
    make = lambda **factory: GnConv(16, 3, s=0.5, **factory)
    check_everything_else(randomise(make(), scale=0.15), make, tokens(2, 16, H, W))


def test_errors():
    with pytest.raises(ValueError, match=r"effvit::GnConv: dim must be a multiple of 2\^\(order - 1\) = 16, got 24"):
        GnConv(24, 5)


def test_keys():
    """Those of the original's state_dict."""
    expected = {f"{n}.{p}" for n in ("proj_in", "dwconv", "proj_out", "pws.0", "pws.1") for p in ("weight", "bias")}
    m = GnConv(16, 3)
    assert m.state_dict().keys() == expected
    assert m.dims == [4, 8, 16] and m.dwconv.weight.shape == (28, 1, 7, 7) and m.pws[1].weight.shape == (16, 8, 1, 1)
