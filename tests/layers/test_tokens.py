"""effvit.layers._tokens: views between tokens and maps, and convolutions that avoid slow dtypes."""

import pytest
import torch
from layer_suite import DTYPES, check, randomise, tokens
from torch import nn

import effvit.layers
from effvit._accuracy import assert_close_to_truth
from effvit.layers import LCM, LiteMLA
from effvit.layers import _tokens as T


def test_views():
    x = tokens(2, 35, 6)
    m = T.as_map(x, (5, 7))
    assert m.shape == (2, 6, 5, 7) and m.is_contiguous(memory_format=torch.channels_last)
    assert m.data_ptr() == x.data_ptr() == T.as_tokens(m).data_ptr()
    assert torch.equal(T.as_tokens(m), x) and torch.equal(T.as_tokens(m.contiguous()), x)
    assert m[1, 3, 2, 4] == x[1, 2 * 7 + 4, 3]
    q, k, v = T.split_tokens(tokens(2, 5, 24), 3, 4)
    assert q.shape == (2, 5, 4, 2) and torch.equal(torch.cat([q, k, v], 2).flatten(2), tokens(2, 5, 24))


@pytest.mark.parametrize("bias", [False, True])
def test_depthwise_over_heads(bias):
    conv = randomise(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=bias))
    x = tokens(2, 35, 12).unflatten(-1, (3, 4))
    y = T.depthwise_over_heads(x, conv, (5, 7)).unflatten(-1, (3, 4))
    for head in range(3):
        torch.testing.assert_close(y[:, :, head], T.as_tokens(conv(T.as_map(x[:, :, head], (5, 7)).contiguous())))


CONVOLUTIONS = {
    "depthwise": nn.Conv2d(12, 12, 5, padding=2, groups=12),
    "grouped, strided, dilated, no bias": nn.Conv2d(12, 6, 3, 2, (1, 2), dilation=(1, 2), groups=3, bias=False),
    "pointwise": nn.Conv2d(12, 7, 1),
    "circular": nn.Conv2d(12, 7, 3, padding=1, padding_mode="circular"),
}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("slow", [(), (torch.bfloat16, torch.float16)], ids=["as it is", "in float32"])
@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolve(conv, slow, dtype, autocast, monkeypatch):
    """Same dtype and, by the project's rule, same values and gradients, whichever way it is computed."""
    monkeypatch.setattr(T, "SLOW_ON_CPU", frozenset(slow))
    conv = randomise(conv).to(dtype)
    x = tokens(3, 12, 9, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        assert T.convolve(conv, x).dtype == conv(x).dtype == (autocast or dtype)
    check(conv, lambda m, x: m(x), x, autocast=autocast, is_map=True, call=T.convolve)


def test_convolve_computes_in_float32_where_the_dtype_is_slow(monkeypatch):
    seen = []
    monkeypatch.setattr(T, "SLOW_ON_CPU", frozenset({torch.bfloat16}))
    monkeypatch.setattr(T.F, "conv2d", lambda x, *a, **kw: seen.append(x.dtype) or torch.zeros_like(x))
    conv, x = nn.Conv2d(4, 4, 1).bfloat16(), tokens(1, 4, 3, 3).bfloat16()
    T.convolve(conv, x)
    T.convolve(conv.half(), x.half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        T.convolve(conv.float(), x.float())
    assert seen == [torch.float32, torch.float16, torch.float32]


def test_hooks_of_a_convolution_fire(monkeypatch):
    monkeypatch.setattr(T, "SLOW_ON_CPU", frozenset({torch.bfloat16}))
    m, x, seen = LCM(6).bfloat16(), tokens(2, 12, 6).bfloat16(), []
    m.conv1.register_forward_hook(lambda *a: seen.append("conv1"))
    m.conv2.register_forward_pre_hook(lambda *a: seen.append("conv2"))
    m(x, (3, 4))
    assert seen == ["conv1", "conv2"]


def test_a_layer_both_ways(monkeypatch):
    m, x, found = randomise(LiteMLA(16, 12)).eval().bfloat16(), tokens(2, 16, 5, 7).bfloat16(), []
    for slow in ((), (torch.bfloat16,)):
        monkeypatch.setattr(T, "SLOW_ON_CPU", frozenset(slow))
        found.append(m(x))
    truth = m.double()(x.double())
    magnitude = truth.abs().amax(1, keepdim=True).expand_as(truth)
    assert_close_to_truth(found[1], truth, found[0], magnitude=magnitude)


MODULES = {
    "ConvEncoder": (lambda: effvit.layers.DualTokenAttention(24, 3), (2, 8, 8, 24), lambda m, x: m.local(x)),
    "NonCausalSSD": (lambda: effvit.layers.NonCausalSSD(24, headdim=12), (2, 20, 24), lambda m, x: m(x, 4, 5)),
    "VMAMBA2Block": (lambda: effvit.layers.VMAMBA2Block(24, (4, 5), 4), (2, 20, 24), lambda m, x: m(x)),
    "SCC": (lambda: effvit.layers.SCC(80, 4, 4, 4), (1, 8, 8, 80), lambda m, x: m(x)),
    "SOFT": (lambda: effvit.layers.SoftmaxFreeAttention(16, 2, 2, 3), (2, 20, 16), lambda m, x: m(x, 4, 5)),
}


@pytest.mark.parametrize("make, shape, call", MODULES.values(), ids=MODULES.keys())
def test_layers_convolve_in_float32_where_the_dtype_is_slow(make, shape, call, monkeypatch):
    monkeypatch.setattr(T, "SLOW_ON_CPU", frozenset({torch.bfloat16}))
    right, seen = torch.conv2d, set()
    monkeypatch.setattr(T.F, "conv2d", lambda x, *a, **kw: seen.add(x.dtype) or right(x, *a, **kw))
    m, x = make().eval().bfloat16(), tokens(*shape).bfloat16()
    assert call(m, x).dtype == torch.bfloat16 and seen == {torch.float32}


HEADS = {
    "SimplifiedLinearAttention": lambda dim: effvit.layers.SimplifiedLinearAttention(dim, 4, 5),
    "FocusedLinearAttention": lambda dim: effvit.layers.FocusedLinearAttention(dim, 4, 5),
    "MLLAttention": lambda dim: effvit.layers.MLLAttention(dim, 4, 5),
    "LinearGlobalAttention": lambda dim: effvit.layers.LinearGlobalAttention(dim, 5, qk_scale=1.0),
}


@pytest.mark.parametrize("name", HEADS)
def test_dim_must_be_a_multiple_of_the_heads(name):
    with pytest.raises(ValueError, match=f"effvit::{name}: dim must be a multiple of num_heads 5, got 24"):
        HEADS[name](24)


@pytest.mark.parametrize("name", ["SimplifiedLinearAttention", "FocusedLinearAttention"])
def test_kernel_size_must_be_odd(name):
    with pytest.raises(ValueError, match=f"effvit::{name}: kernel_size must be odd, got 4"):
        getattr(effvit.layers, name)(24, 4, 3, kernel_size=4)
