"""effvit.layers.Im2winConv2d against torch.nn.Conv2d, and im2win's arrangement against its definition."""

import pytest
import torch
from layer_suite import DTYPES, Record, check, check_everything_else, randomise, tokens
from torch import nn

from effvit.layers import Im2winConv2d, im2win

SHAPE = (2, 8, 7, 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("args, options", [
    ((8, 6, 3), {}),
    ((8, 6, (2, 3)), {"stride": (2, 1), "padding": (1, 2), "bias": False}),
    ((8, 12, 3), {"groups": 4, "padding": "same"}),
    ((8, 6, (3, 2)), {"dilation": (2, 3), "stride": (1, 2), "padding": 2}),
    ((8, 8, 5), {"groups": 8, "padding": 2}),
    ((8, 8, 3), {"groups": 8, "padding": 1, "stride": 2}),
    ((8, 8, (2, 4)), {"groups": 8, "padding": "same", "dilation": (3, 1)}),
    ((8, 8, 3), {"groups": 8, "padding": "valid"}),
], ids=["dense", "strided", "groups", "dilated", "depthwise", "depthwise, strided", "depthwise, same",
        "depthwise, valid"])  # fmt: skip
def test_like_conv2d(args, options, dtype):
    m, original = Im2winConv2d(*args, **options), nn.Conv2d(*args, **options)
    m.load_state_dict(randomise(original).state_dict(), strict=True)
    x = tokens(*SHAPE, dtype=dtype)
    found = check(m.to(dtype), nn.Conv2d.forward, x, is_map=True)
    assert found["output"].shape == original(x.float()).shape


def test_depthwise_convolutions_are_the_operators():
    padded = [(Im2winConv2d(8, 8, 3, groups=8, padding=p), 1) for p in (1, "same", "valid")]
    for m, expected in (*padded, (Im2winConv2d(8, 8, 3), 0)):
        with Record() as calls:
            m(tokens(*SHAPE))
        assert calls.names.count("dwconv") == expected


def test_windows_are_pieces_of_the_arrangement():
    x, (kh, kw) = tokens(*SHAPE), (3, 2)
    y = im2win(x, kh, stride=2)
    assert y.shape == (2, 8, 3, 9 * kh)
    for i in range(3):
        for j in range(9 - kw + 1):
            window = x[:, :, 2 * i : 2 * i + kh, j : j + kw]
            assert torch.equal(y[:, :, i, j * kh : (j + kw) * kh], window.mT.flatten(2))
    y = im2win(x, 3, dilation=2)
    assert torch.equal(y[:, :, 1, 12:15], x[:, :, [1, 3, 5], 4])


def test_errors():
    with pytest.raises(ValueError, match="effvit::Im2winConv2d: padding_mode must be 'zeros', got 'reflect'"):
        Im2winConv2d(8, 8, 3, padding_mode="reflect")
    with pytest.raises(ValueError, match=r"effvit::im2win: x must be \[B, C, H, W\] with H at least 9, got"):
        im2win(tokens(*SHAPE), 5, dilation=2)


def test_autocast():
    for groups in (1, 8):
        m = randomise(Im2winConv2d(8, 8, 3, padding=1, groups=groups))
        check(m, nn.Conv2d.forward, tokens(*SHAPE), is_map=True, autocast=torch.bfloat16)


@pytest.mark.parametrize("groups", [2, 8])
def test_the_rest(groups):
    make = lambda **factory: Im2winConv2d(8, 8, 3, padding=1, groups=groups, **factory)
    check_everything_else(randomise(make()), make, tokens(*SHAPE))
