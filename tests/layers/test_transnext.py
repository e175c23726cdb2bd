"""effvit.layers.ConvGLU against TransNeXt's formula with a plain convolution."""

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, randomise, tokens
from torch import nn

from effvit.layers import ConvGLU

H, W, C = 5, 7, 24


def call(m, x):
    return m(x, H, W)


def plain_glu(m, x):
    """fc2(act(dwconv(x)) * v), on maps with channels first."""
    x, v = (t.transpose(1, 2).unflatten(2, (H, W)) for t in m.fc1(x).chunk(2, dim=-1))
    return m.fc2((m.act(m.dwconv.dwconv(x)) * v).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU, nn.Tanh, nn.Identity, nn.Hardswish])
def test_glu_like_the_formula(act, dtype):
    m = randomise(ConvGLU(C, 50, C + 2, act_layer=act)).to(dtype)
    assert m.fc2.in_features == 33 and m.fc2.out_features == C + 2
    check(m, plain_glu, tokens(2, H * W, C, dtype=dtype), call=call)


def test_glu_under_autocast():
    check(randomise(ConvGLU(C)), plain_glu, tokens(2, H * W, C), call=call, autocast=torch.bfloat16)


def test_glu_with_the_approximate_gelu():
    m = randomise(ConvGLU(C, act_layer=lambda: nn.GELU(approximate="tanh")))
    check(m, plain_glu, tokens(2, H * W, C), call=call)


@pytest.mark.parametrize("where", ["dwconv", "dwconv.dwconv", "act"])
def test_a_hook_inside_of_glu_is_called(where):
    m, seen = randomise(ConvGLU(C)), []
    m.get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    y = call(m, tokens(1, H * W, C))
    assert seen
    torch.testing.assert_close(y, plain_glu(m, tokens(1, H * W, C)))


def test_everything_else_of_glu():
    make = lambda **factory: ConvGLU(C, 30, **factory)
    check_everything_else(randomise(make()), make, tokens(2, H * W, C), call=call)


def test_keys_of_glu():
    """Those of the original's state_dict."""
    m = ConvGLU(C, 48)
    expected = {f"{name}.{p}" for name in ("fc1", "dwconv.dwconv", "fc2") for p in ("weight", "bias")}
    assert m.state_dict().keys() == expected and m.fc1.weight.shape == (64, C)


def test_dropout_of_glu():
    torch.manual_seed(0)
    m = ConvGLU(C, drop=0.5).train()
    y = call(m, tokens(4, H * W, C))
    assert 0.4 < float((y == 0).float().mean()) < 0.6
