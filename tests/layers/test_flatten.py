"""effvit.layers.FocusedLinearAttention against the paper's formula."""

import pytest
import torch
import torch.nn.functional as F
from layer_suite import DTYPES, attend, check_everything_else, check_forms, randomise, tokens

from effvit.layers import FocusedLinearAttention
from effvit.layers.flatten import focus


def plain(m, x, form="pairs"):
    """Focused features by the definition, and a convolution of every head's map."""
    B, N, C = x.shape
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    features = []
    for t in (q, k + m.positional_encoding):
        y = (t.relu() + 1e-6) / F.softplus(m.scale)
        power = y**m.focusing_factor
        features.append(power / power.norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True))
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in (*features, v))
    out = attend(q, k / N, v, lambda s: s + 1e-6, form=form)
    maps = v.transpose(-1, -2).reshape(B * m.num_heads, -1, *m.window_size)
    local = m.dwc(maps).reshape(B, C, N).transpose(1, 2)
    return m.proj(out.transpose(1, 2).flatten(2) + local)


VARIANTS = {
    "plain": {},
    "factor 4, kernel 3": {"focusing_factor": 4, "kernel_size": 3},
    "one head, no bias": {"num_heads": 1, "qkv_bias": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(5, 7), (2, 3), (6, 6)], ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_formula(kwargs, window, dtype):
    m = randomise(FocusedLinearAttention(24, window, **{"num_heads": 3, **kwargs})).to(dtype)
    check_forms(m, plain, tokens(3, window[0] * window[1], 24, dtype=dtype))


def test_autocast():
    m = randomise(FocusedLinearAttention(24, (5, 7), 3))
    check_forms(m, plain, tokens(2, 35, 24), autocast=torch.bfloat16)


def test_small_means_are_not_normalised_to_one():
    """Means near eps, 1e-6: the attention fades out instead of dividing by almost nothing."""
    m = randomise(FocusedLinearAttention(24, (5, 7), 3, qkv_bias=False))
    with torch.no_grad():
        m.positional_encoding.mul_(1e-3)
    check_forms(m, plain, tokens(3, 35, 24) * 1e-3)


def test_maps_and_masks():
    m = randomise(FocusedLinearAttention(24, (5, 7), 3, proj_drop=0.3))
    x = tokens(2, 35, 24)
    assert not torch.equal(m(x), m(x))
    m.eval()
    torch.testing.assert_close(m(x.unflatten(1, (5, 7))), m(x).unflatten(1, (5, 7)))
    torch.testing.assert_close(m(x, mask=torch.zeros(1, 35, 35)), m(x))
    for shape in ((2, 34, 24), (2, 7, 5, 24)):
        with pytest.raises(ValueError, match=r"FocusedLinearAttention: x must be \[B, 35, C\] or \[B, 5, 7, C\], got"):
            m(tokens(*shape))


@pytest.mark.parametrize("factor", [1, 3, 12])
@pytest.mark.parametrize("magnitude", [0.0, 1e-6, 1.0, 1e4])
def test_focus_keeps_the_norm_at_any_magnitude(magnitude, factor):
    """Powers of entries near 1e-6 underflow and those of large ones overflow, unless taken of y / |y|."""
    x = tokens(5, 16) * magnitude
    scale = torch.rand(16) + 0.5
    y = (x.double().relu() + 1e-6) / scale.double()
    expected = y**factor / (y**factor).norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(focus(x, scale, factor), expected.float(), rtol=1e-5, atol=1e-6 * float(expected.max()))


def test_parameter_names_are_the_originals():
    names = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "dwc.weight", "dwc.bias"}
    state = FocusedLinearAttention(24, (4, 4), 3).state_dict()
    assert set(state) == names | {"scale", "positional_encoding"}
    assert state["scale"].shape == (1, 1, 24) and state["positional_encoding"].shape == (1, 16, 24)
    assert state["dwc.weight"].shape == (8, 1, 5, 5)


def test_the_rest():
    make = lambda **factory: FocusedLinearAttention(24, (5, 7), 3, **factory)
    check_everything_else(randomise(make()), make, tokens(2, 35, 24))
