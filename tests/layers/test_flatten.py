"""effvit.layers' focused linear attention of FLatten-Swin, -PVT and -CSWin against the paper's formula."""

import pytest
import torch
import torch.nn.functional as F
from layer_suite import DTYPES, attend, check_everything_else, check_forms, randomise, tokens

from effvit.layers import FocusedLinearAttention, FocusedLinearAttentionCSWin, FocusedLinearAttentionPVT
from effvit.layers.flatten import focus


def focused(m, q, k, v, form):
    """Focused features by the definition: q [B, N, C], k and v [B, n, C] -> [B, N, C]."""
    features = []
    for t in (q, k + m.positional_encoding):
        y = (t.relu() + 1e-6) / F.softplus(m.scale)
        power = y**m.focusing_factor
        features.append(power / power.norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True))
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in (*features, v))
    return attend(q, k / k.shape[-2], v, lambda s: s + 1e-6, form=form).transpose(1, 2).flatten(2)


def local(m, v, size):
    """A convolution of every head's map, v [B, N, C] -> [B, N, C]."""
    B, N, C = v.shape
    maps = v.mT.reshape(B * m.num_heads, -1, *size)
    return m.dwc(maps).reshape(B, C, N).mT


def plain(m, x, form="pairs"):
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    return m.proj(focused(m, q, k, v, form) + local(m, v, m.window_size))


def reduced(m, x):
    """What keys and values of FLatten-PVT are made of."""
    maps = x.mT.unflatten(-1, SIZE)
    if m.linear:
        return m.act(m.norm(m.sr(F.adaptive_avg_pool2d(maps, 7)).flatten(2).mT))
    return m.norm(m.sr(maps).flatten(2).mT) if m.sr_ratio > 1 else x


def plain_pvt(m, x, form="pairs"):
    k, v = m.kv(reduced(m, x)).chunk(2, dim=-1)
    out = focused(m, m.q(x), k, v, form)
    if v.shape[1] != x.shape[1]:
        v = F.interpolate(v.mT, size=x.shape[1], mode="linear").mT
    return m.proj(out + local(m, v, SIZE))


def plain_cswin(m, x, form="pairs"):
    q, k, v = x.chunk(3, dim=-1)
    size = (m.resolution, m.resolution)
    return focused(m, q, k, v, form) + local(m, v, size) + m.get_v(v.mT.unflatten(-1, size)).flatten(2).mT


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


SIZE = (6, 9)  # of FLatten-PVT's map
PVT = {
    "plain": {},
    "reduced by 3": {"sr_ratio": 3, "qkv_bias": True, "qk_scale": 3.0, "attn_drop": 0.1},
    "reduced by 2, with a remainder": {"sr_ratio": 2, "num_patches": 48, "num_heads": 1, "kernel_size": 3},
    "pooled": {"linear": True, "num_patches": 49, "focusing_factor": 4},
    "one position": {"sr_ratio": 2, "num_patches": 4},
}


def make_pvt(**kwargs):
    return FocusedLinearAttentionPVT(24, **{"num_patches": 54, "num_heads": 3, **kwargs})


def call_pvt(m, x):
    return m(x, *SIZE)


def call_cswin(m, x):
    return m(x.unflatten(-1, (3, -1)).permute(2, 0, 1, 3))  # as its block calls it


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", PVT.values(), ids=PVT.keys())
def test_pvt(kwargs, dtype):
    check_forms(randomise(make_pvt(**kwargs)).to(dtype), plain_pvt, tokens(2, 54, 24, dtype=dtype), call=call_pvt)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", [{"idx": -1}, {"idx": 1, "split_size": 5, "kernel_size": 3, "focusing_factor": 4}])
def test_cswin(kwargs, dtype):
    m = randomise(FocusedLinearAttentionCSWin(24, 5, num_heads=3, **kwargs)).to(dtype)
    check_forms(m, plain_cswin, tokens(2, 25, 72, dtype=dtype), call=call_cswin)


def test_autocast_of_the_variants():
    check_forms(randomise(make_pvt(sr_ratio=3)), plain_pvt, tokens(2, 54, 24), autocast=torch.bfloat16, call=call_pvt)
    m = randomise(FocusedLinearAttentionCSWin(24, 5, -1, num_heads=3))
    check_forms(m, plain_cswin, tokens(2, 25, 72), autocast=torch.bfloat16, call=call_cswin)


def test_parameter_names_of_the_variants():
    shared = {"dwc.weight", "dwc.bias", "scale", "positional_encoding"}
    pvt = shared | {"q.weight", "kv.weight", "proj.weight", "proj.bias"}
    assert set(make_pvt().state_dict()) == pvt
    reduction = {"sr.weight", "sr.bias", "norm.weight", "norm.bias"}
    state = make_pvt(sr_ratio=3, qkv_bias=True).state_dict()
    assert set(state) == pvt | reduction | {"q.bias", "kv.bias"}
    assert state["sr.weight"].shape == (24, 24, 3, 3) and state["positional_encoding"].shape == (1, 6, 24)
    state = make_pvt(linear=True, sr_ratio=3).state_dict()
    assert set(state) == pvt | reduction and state["sr.weight"].shape == (24, 24, 1, 1)
    state = FocusedLinearAttentionCSWin(24, 5, -1, num_heads=3, dim_out=48).state_dict()
    assert set(state) == shared | {"get_v.weight", "get_v.bias"} and state["positional_encoding"].shape == (1, 25, 24)


def test_the_variants_refuse():
    pvt, cswin = r"FocusedLinearAttentionPVT: ", r"FocusedLinearAttentionCSWin: "
    for call, message in (
        (
            lambda: make_pvt(sr_ratio=0),
            pvt + "sr_ratio must be at least 1 and at most the root of num_patches 54, got 0",
        ),
        (lambda: make_pvt(sr_ratio=8), pvt + "sr_ratio must be .*, got 8"),
        (lambda: make_pvt()(tokens(1, 54, 24), 6, 8), pvt + r"x must be \[B, 48, C\] or \[B, 6, 8, C\]"),
        (lambda: make_pvt()(tokens(1, 48, 24), 6, 8), pvt + "H, W must give 54 keys, got 6, 8, which give 48"),
        (
            lambda: make_pvt(linear=True)(tokens(1, 54, 24), 6, 9),
            pvt + "H, W must give 54 keys, got 6, 9, which give 49",
        ),
        (lambda: FocusedLinearAttentionCSWin(24, 6, 2), cswin + "idx must be -1, 0 or 1, got 2"),
        (lambda: FocusedLinearAttentionCSWin(24, 6, 0, 2), cswin + "split_size must be the resolution 6, got 2"),
        (lambda: FocusedLinearAttentionCSWin(24, 6, -1)(tokens(3, 1, 35, 24)), cswin + r"x must be \[B, 36, C\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("make, x, call", [
    (lambda **factory: FocusedLinearAttention(24, (5, 7), 3, **factory), tokens(2, 35, 24), None),
    (lambda **factory: make_pvt(sr_ratio=3, **factory), tokens(2, 54, 24), call_pvt),
    (
        lambda **factory: FocusedLinearAttentionCSWin(24, 5, -1, num_heads=3, **factory), tokens(2, 25, 72),
        call_cswin,
    ),
], ids=["Swin", "PVT", "CSWin"])  # fmt: skip
def test_the_rest(make, x, call):
    check_everything_else(randomise(make(), scale=0.2), make, x, call)
