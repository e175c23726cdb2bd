"""Layers between convolutions, trained under torch.compile's default compiler, inductor: one layer for every operator.

Inductor keeps maps, and whatever else has four dimensions, channels last between convolutions. An operator's backward
is traced on those strides, and yet gets the ones that its forward returned.
"""

import pytest
import torch
from layer_suite import check, randomise, tokens
from torch import nn

from effvit.layers import ConvPosEnc, LiteLA, SoftmaxFreeAttention, WindowAttention

H, W, DIM = 4, 8, 8


def soft():
    m = randomise(SoftmaxFreeAttention(DIM, 2, 2, 0))
    with torch.no_grad():
        m.attn.Qnorm_act[0].weight.add_(3)  # near landmarks blow rounding errors up
    return m, lambda m, x: m(x.flatten(2).mT, H, W).mT.unflatten(2, (H, W))


def linear():
    return randomise(LiteLA(DIM, DIM, dim=4)), lambda m, x: m(x.flatten(2).mT).mT.unflatten(2, (H, W))


def window():
    m = randomise(WindowAttention(DIM, 2, window_size=4))
    return m, lambda m, x: m.forward_map(x.permute(0, 2, 3, 1), shift=(2, 2)).permute(0, 3, 1, 2)


def depthwise():
    return randomise(ConvPosEnc(DIM, 5)), lambda m, x: m(x)


class BetweenConvolutions(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.first = randomise(nn.Conv2d(3, DIM, 3, padding=1), seed=1)
        self.layer = layer
        self.last = randomise(nn.Conv2d(DIM, DIM, 3, padding=1), seed=2)
        self.call = call

    def forward(self, x):
        return self.last(self.call(self.layer, self.first(x)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [soft, linear, window, depthwise])
def test_training_between_convolutions(make):
    torch._dynamo.reset()
    check(
        BetweenConvolutions(*make()),
        lambda m, x: m(x),
        tokens(2, 3, H, W),
        call=lambda m, x: torch.compile(m, fullgraph=True)(x),
        is_map=True,
    )
