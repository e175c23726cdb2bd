"""effvit.layers.TVConv against its formula with unfolded patches."""

import pytest
import torch
import torch.nn.functional as F
from layer_suite import DTYPES, check, check_everything_else, check_merged, randomise, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import TVConv

B, C, H, W = 2, 6, 4, 5


def made(m, layers):
    y = m.posi_map
    for conv, norm, _ in layers[:-1]:
        y = F.layer_norm(conv(y), norm.normalized_shape, norm.weight, norm.bias, norm.eps).clamp(min=0)
    return layers[-1](y)


def unfolded(m, x, weight, bias):
    k, (h, w) = m.taps, m.size
    patches = F.unfold(x, k, padding=k // 2, stride=m.step).view(len(x), C, k * k, h, w)
    y = (weight.view(1, C, k * k, h, w) * patches).sum(2)
    return y if bias is None else y + bias


def plain(m, x):
    if hasattr(m, "weight_maps"):
        bias = m.bias_maps.permute(2, 0, 1) if hasattr(m, "bias_maps") else None
        return unfolded(m, x, m.weight_maps.permute(3, 0, 1, 2).contiguous(), bias)
    bias = None if m.bias_layers is None else made(m, m.bias_layers)
    return unfolded(m, x, made(m, m.weight_layers), bias)


def make(**options):
    return TVConv(C, **{"TVConv_inter_chans": 5, "TVConv_Bias": True, "h": H, "w": W, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    {}, {"TVConv_k": 5, "TVConv_Bias": False}, {"stride": 2}, {"TVConv_inter_layers": 3, "TVConv_posi_chans": 2},
], ids=str)  # fmt: skip
def test_like_the_formula(options, dtype):
    m, s = randomise(make(**options)).to(dtype), options.get("stride", 1)
    check(m, plain, tokens(B, C, s * H, s * W, dtype=dtype), is_map=True)
    if s == 2:
        check(m, plain, tokens(B, C, 2 * H - 1, 2 * W, dtype=dtype), is_map=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_merged(bias, dtype):
    m, x = randomise(make(TVConv_Bias=bias)).to(dtype), tokens(B, C, H, W, dtype=dtype)
    merged = check_merged(m, x, yardsticks=[plain])
    assert not list(merged.parameters()) and merged.weight_maps.shape == (9, H, W, C)


def test_weights_differ_between_positions():
    """A map of ones reads the sums of the taps inside, which a convolution would repeat in the interior."""
    m = randomise(make(TVConv_Bias=False))
    y = m(torch.ones(1, C, H, W))
    assert (y[..., 1, 1] - y[..., 2, 2]).abs().min() > 1e-3


def test_state_dict_is_the_originals():
    names = {"posi_map", "TVConv_k", "TVConv_k_square", "stride", "channels", "h", "w"}
    for part in ("weight_layers", "bias_layers"):
        for i in (0, 1):
            names |= {f"{part}.{i}.0.weight", f"{part}.{i}.1.weight", f"{part}.{i}.1.bias"}
        names.add(f"{part}.2.weight")
    m = make()
    assert set(m.state_dict()) == names
    assert m.weight_layers[2].weight.shape == (9 * C, 5, 3, 3) and m.bias_layers[2].weight.shape == (C, 5, 3, 3)
    state = m.state_dict() | {"TVConv_k": torch.tensor(5)}
    with pytest.raises(RuntimeError, match="effvit::TVConv: TVConv_k must be 3, got 5"):
        make().load_state_dict(state)
    other = make()
    other.load_state_dict(m.state_dict(), strict=True)
    assert_bitwise_equal(other(tokens(B, C, H, W)), m(tokens(B, C, H, W)))


def test_errors():
    with pytest.raises(ValueError, match="effvit::TVConv: TVConv_k must be odd, got 4"):
        make(TVConv_k=4)
    expected = r"effvit::TVConv: x must be \[B, 6, H, W\] of which stride 1 makes 4 x 5, got \[2, 6, 5, 5\]"
    with pytest.raises(ValueError, match=expected):
        make()(tokens(B, C, H + 1, W))


def test_autocast():
    m = randomise(make())
    m.reparameterize()
    check(m, plain, tokens(B, C, H, W), is_map=True, autocast=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(randomise(make())(tokens(B, C, H, W))).all()


def test_the_rest():
    make_it = lambda **factory: make(unused=1, **factory)
    check_everything_else(randomise(make_it()), make_it, tokens(B, C, H, W))
