"""effvit.layers against timm: WindowAttention and SwinTransformerBlock, outputs, gradients, state_dicts, geometry."""

import copy

import pytest
import timm.models.swin_transformer as timm_swin
import torch
from layer_suite import check, check_quantised, quantised, tokens

from effvit._accuracy import assert_bitwise_equal, assert_close_to_truth
from effvit.layers import SwinTransformerBlock, WindowAttention

DTYPES = [torch.float32, torch.bfloat16]


def randomise(module, seed=0):
    """Parameters at a scale where bias table, qkv bias and mask all matter."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    return module


def with_gradients(module, x, weight, call=None):
    """Output and all gradients, by name."""
    x = x.clone().requires_grad_()
    y = module(x) if call is None else call(module, x)
    module.zero_grad()
    (y * weight.to(y.dtype)).sum().backward()
    found = {"output": y.detach(), "input": x.grad}
    found.update({name: p.grad for name, p in module.named_parameters()})
    return found


def on_sdpa(module):
    """timm's other implementation of the same formula: a second yardstick."""
    for m in module.modules():
        if isinstance(m, timm_swin.WindowAttention):
            m.fused_attn = True
    return module


def check_against_timm(ours, theirs, x, call_ours=None, call_theirs=None):
    """Outputs and gradients of ours, theirs being the yardstick and theirs in float64 the truth."""
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    got = with_gradients(ours, x, weight, call_ours)
    yardsticks = [with_gradients(m, x, weight, call_theirs) for m in (theirs, on_sdpa(copy.deepcopy(theirs)))]
    truth = with_gradients(copy.deepcopy(theirs).double(), x.double(), weight.to(x.dtype).double(), call_theirs)
    assert got.keys() == truth.keys()
    for name in truth:
        # The gradient of a bias or a table sums over the map: measured against its largest entry.
        magnitude = None if name in ("output", "input") else truth[name].abs().max().expand_as(truth[name])
        assert_close_to_truth(got[name], truth[name], [y[name] for y in yardsticks], magnitude=magnitude, name=name)


def pair_of_blocks(dtype=torch.float32, **kwargs):
    theirs = randomise(timm_swin.SwinTransformerBlock(**kwargs)).to(dtype)
    ours = SwinTransformerBlock(**kwargs).to(dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


# ---- WindowAttention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"dim": 24, "num_heads": 3},
        {"dim": 24, "num_heads": 2, "head_dim": 5, "window_size": (3, 5)},
        {"dim": 16, "num_heads": 4, "window_size": 4, "qkv_bias": False},
        {"dim": 8, "num_heads": 1, "window_size": 1},
    ],
    ids=["plain", "head_dim, non-square", "no qkv bias", "window 1"],
)
@pytest.mark.parametrize("mask", [False, True], ids=["", "arbitrary mask"])
def test_windows_like_timm(kwargs, dtype, mask):
    theirs = randomise(timm_swin.WindowAttention(**kwargs)).to(dtype)
    ours = WindowAttention(**kwargs).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    n = theirs.window_area
    x = torch.randn(6, n, kwargs["dim"], generator=torch.Generator().manual_seed(1)).to(dtype)
    m = torch.randn(3, n, n, generator=torch.Generator().manual_seed(2)).to(dtype) if mask else None

    def call(module, x):
        return module(x, mask=None if m is None else m.to(x.dtype))

    check_against_timm(ours, theirs, x, call, call)


def test_attention_dropout_is_applied_in_training_only():
    kwargs = {"dim": 24, "num_heads": 3, "window_size": 4, "attn_drop": 0.4}
    theirs = randomise(timm_swin.WindowAttention(**kwargs))
    ours = WindowAttention(**kwargs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 16, 24)
    torch.manual_seed(3)
    a = ours(x)
    torch.manual_seed(3)
    b = theirs(x)  # the same draws: both drop probabilities of the same shape
    torch.testing.assert_close(a, b)
    assert not torch.equal(ours(x), a)
    assert_bitwise_equal(ours.eval()(x), ours(x))
    torch.testing.assert_close(ours(x), theirs.eval()(x))


def test_dropout_training_of_a_shifted_padded_map():
    ours, theirs = pair_of_blocks(
        dim=24, num_heads=3, window_size=4, shift_size=2, input_resolution=(10, 7), attn_drop=0.3, dynamic_mask=True
    )
    x = torch.randn(2, 10, 7, 24)
    torch.manual_seed(5)
    a = ours(x)
    torch.manual_seed(5)
    torch.testing.assert_close(a, theirs(x))


def test_float64_and_empty_batch():
    theirs = randomise(timm_swin.WindowAttention(24, 3, window_size=4)).double()
    ours = WindowAttention(24, 3, window_size=4).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 16, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.float()(x[:0].float()).shape == (0, 16, 24)
    assert ours(torch.randn(0, 8, 8, 24), shift=(2, 2)).shape == (0, 8, 8, 24)


def test_a_map_takes_no_mask():
    with pytest.raises(ValueError, match="mask must be None for a map"):
        WindowAttention(24, 3, window_size=4)(torch.randn(1, 8, 8, 24), mask=torch.zeros(4, 16, 16))


@pytest.mark.parametrize("roll_before_pad", [True, False])
@pytest.mark.parametrize("shift", [(0, 0), (2, 1), (0, 3)])
def test_map_equals_its_plain_pytorch_form(shift, roll_before_pad):
    attn = randomise(WindowAttention(24, 3, window_size=(4, 5)))
    x = torch.randn(2, 9, 7, 24, generator=torch.Generator().manual_seed(0))

    def plain(module, x):
        return module._forward_map_eager(x, shift, roll_before_pad)

    def fused(module, x):
        return module.forward_map(x, shift=shift, roll_before_pad=roll_before_pad)

    check_against_timm(attn, copy.deepcopy(attn), x, fused, plain)


@pytest.mark.parametrize("new", [5, (3, 6), 4])
def test_set_window_size_like_timm(new):
    theirs = randomise(timm_swin.WindowAttention(24, 3, window_size=4))
    ours = WindowAttention(24, 3, window_size=4)
    ours.load_state_dict(theirs.state_dict())
    ours.relative_position_bias_table.requires_grad_(False)
    theirs.set_window_size(new)
    ours.set_window_size(new)
    assert (ours.window_size, ours.window_area) == (theirs.window_size, theirs.window_area)
    assert not ours.relative_position_bias_table.requires_grad
    assert_bitwise_equal(ours.relative_position_bias_table, theirs.relative_position_bias_table)
    x = torch.randn(2, ours.window_area, 24)
    torch.testing.assert_close(ours(x), theirs(x))


def test_initialisation_of_the_table():
    torch.manual_seed(0)
    table = WindowAttention(96, 3, window_size=20).relative_position_bias_table
    assert abs(table.std().item() - 0.02) < 0.001 and abs(table.mean().item()) < 0.001


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 9, 6)], ids=["divisible", "padded"])
def test_autocast(shape):
    ours, theirs = pair_of_blocks(
        dim=24, num_heads=3, window_size=4, shift_size=2, input_resolution=shape[1:], dynamic_mask=True
    )
    x = torch.randn(*shape, 24, generator=torch.Generator().manual_seed(0))

    def cast(module, x):
        if x.dtype == torch.float64:
            return module(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    got, yardstick = (with_gradients(m, x, weight, cast) for m in (ours, theirs))
    truth = with_gradients(copy.deepcopy(theirs).double(), x.double(), weight.double(), cast)
    eps = torch.finfo(torch.bfloat16).eps
    for name in truth:
        magnitude = truth[name].abs().max().expand_as(truth[name])
        assert_close_to_truth(got[name], truth[name], yardstick[name], magnitude=magnitude, eps=eps, name=name)


class LowRank(torch.nn.Module):
    """A projection that is not a Linear, as adapters make them."""

    def __init__(self, linear):
        super().__init__()
        self.base = linear
        self.down = torch.nn.Linear(linear.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, linear.out_features)  # with a bias: padded tokens contain it too

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("kind", ["adapter", "forward hook"])
def test_projection_that_is_not_a_plain_linear(kind):
    ours, theirs = pair_of_blocks(
        dim=24, num_heads=3, window_size=4, shift_size=2, input_resolution=(7, 9), dynamic_mask=True
    )
    for block in (ours, theirs):
        if kind == "adapter":
            torch.manual_seed(1)
            block.attn.qkv = LowRank(block.attn.qkv)
        else:
            block.attn.qkv.register_forward_hook(lambda module, args, out: out * 1.5 + 1)
    check_against_timm(ours, theirs, torch.randn(2, 7, 9, 24, generator=torch.Generator().manual_seed(0)))


# ---- SwinTransformerBlock ----------------------------------------------------------------------------------------

GEOMETRIES = {
    "no shift": {"input_resolution": (8, 12), "window_size": 4},
    "shift": {"input_resolution": (8, 12), "window_size": 4, "shift_size": 2},
    "padded": {"input_resolution": (9, 14), "window_size": 4},
    "padded, shift": {"input_resolution": (9, 14), "window_size": 4, "shift_size": 2},
    "padded, non-square window, uneven shift": {
        "input_resolution": (11, 10),
        "window_size": (3, 6),
        "shift_size": (1, 4),
    },
    "shift on one axis": {"input_resolution": (9, 10), "window_size": (4, 4), "shift_size": (0, 3)},
    "map equals window": {"input_resolution": (7, 7), "window_size": 7, "shift_size": 3},
    "map below window": {"input_resolution": (5, 12), "window_size": 7, "shift_size": 3},
    "always partition, map below window": {
        "input_resolution": (5, 5),
        "window_size": 7,
        "shift_size": 3,
        "always_partition": True,
    },
    "shift beyond the map": {
        "input_resolution": (2, 9),
        "window_size": 7,
        "shift_size": 3,
        "always_partition": True,
    },
    "head dim": {"input_resolution": (9, 8), "window_size": 4, "shift_size": 2, "head_dim": 12},
    "no qkv bias": {"input_resolution": (9, 8), "window_size": 4, "shift_size": 2, "qkv_bias": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_block_like_timm(geometry, dtype):
    ours, theirs = pair_of_blocks(dtype, dim=24, num_heads=3, **geometry)
    for name in ("window_size", "shift_size", "window_area"):
        assert getattr(ours, name) == getattr(theirs, name), name
    x = torch.randn(2, *geometry["input_resolution"], 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    check_against_timm(ours, theirs, x)


@pytest.mark.parametrize("shape", [(8, 8), (13, 9), (3, 20)])
def test_block_takes_maps_of_other_sizes(shape):
    """A block whose mask timm builds per call; ours has none in any case."""
    ours, theirs = pair_of_blocks(
        dim=24, num_heads=3, window_size=4, shift_size=2, input_resolution=(12, 12), dynamic_mask=True
    )
    check_against_timm(ours, theirs, torch.randn(2, *shape, 24, generator=torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("feat, window, always", [((14, 10), 5, None), ((3, 9), (4, 3), None), ((6, 6), 7, True)])
def test_set_input_size_like_timm(feat, window, always):
    ours, theirs = pair_of_blocks(dim=24, num_heads=3, window_size=4, shift_size=2, input_resolution=(12, 12))
    for block in (ours, theirs):
        block.set_input_size(feat, window, always)
    for name in ("window_size", "shift_size", "window_area", "input_resolution", "always_partition"):
        assert getattr(ours, name) == getattr(theirs, name), name
    check_against_timm(ours, theirs, torch.randn(2, *feat, 24, generator=torch.Generator().manual_seed(4)))


def test_drop_path():
    block = randomise(SwinTransformerBlock(24, (8, 8), 3, window_size=4, drop_path=0.5, proj_drop=0.1, device="cpu"))
    x = torch.randn(64, 8, 8, 24)
    torch.manual_seed(0)
    kept = (block(x) != x).flatten(1).any(1).float().mean().item()
    assert 0.5 < kept < 0.95  # both branches dropped with probability a quarter
    assert_bitwise_equal(block.eval()(x), block(x))


def test_drop_path_keeps_the_expectation():
    from effvit.layers.swin_block import DropPath

    torch.manual_seed(0)
    y = DropPath(0.25)(torch.ones(8000, 2, 2, 1))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs(y.mean().item() - 1) < 0.03
    assert DropPath(1.0)(torch.ones(4, 2)).abs().max() == 0


def test_checkpoint_of_a_model_loads_into_our_blocks():
    torch.manual_seed(0)
    model = timm_swin.SwinTransformer(
        img_size=64, embed_dim=24, depths=(2, 2), num_heads=(3, 6), window_size=4, num_classes=5
    ).eval()
    ours = copy.deepcopy(model)
    for stage in ours.layers:
        for i, b in enumerate(stage.blocks):
            block = SwinTransformerBlock(
                b.dim, b.input_resolution, b.attn.num_heads, window_size=b.window_size, shift_size=b.shift_size
            )
            stage.blocks[i] = block.eval()
    assert ours.state_dict().keys() == model.state_dict().keys()
    ours.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert_close_to_truth(ours(x), copy.deepcopy(model).double()(x.double()), model(x))


# ---- Microsoft's Swin --------------------------------------------------------------------------------------------


def microsofts(theirs):
    """The state_dict of Microsoft's block: with the buffers that timm's block computes and does not save."""
    buffers = {"attn.relative_position_index": theirs.attn.relative_position_index}
    if theirs.attn_mask is not None:
        buffers["attn_mask"] = theirs.attn_mask
    return {**theirs.state_dict(), **buffers}


SHIFTED = {"dim": 24, "input_resolution": (8, 12), "num_heads": 3, "window_size": 4, "shift_size": 2}


@pytest.mark.parametrize("shift", [0, 2])
def test_checkpoints_of_microsoft_load_strictly(shift):
    theirs = randomise(timm_swin.SwinTransformerBlock(**{**SHIFTED, "shift_size": shift}))
    ours = SwinTransformerBlock(**{**SHIFTED, "shift_size": shift}, fused_window_process=True)
    state = microsofts(theirs)
    assert ("attn_mask" in state) == bool(shift)
    keys = set(state)
    ours.load_state_dict(state, strict=True)
    assert set(state) == keys and not keys & {"attn_mask"} & set(ours.state_dict())
    check_against_timm(ours, theirs, torch.randn(2, 8, 12, 24, generator=torch.Generator().manual_seed(4)))
    model = torch.nn.Sequential(torch.nn.Identity(), ours)
    model.load_state_dict({f"1.{name}": t for name, t in state.items()}, strict=True)
    with torch.device("meta"):
        meta = SwinTransformerBlock(**{**SHIFTED, "shift_size": shift})
    meta.load_state_dict(state, strict=True, assign=True)
    meta.load_state_dict({name: t.to("meta") for name, t in state.items()}, strict=True, assign=True)
    larger = SwinTransformerBlock(**{**SHIFTED, "shift_size": shift, "input_resolution": (16, 16)})
    larger.load_state_dict(state, strict=True)  # the mask of another resolution


def test_checkpoints_of_another_window_or_shift_do_not_load():
    state = microsofts(randomise(timm_swin.SwinTransformerBlock(**SHIFTED)))
    other = {**state, "attn_mask": state["attn_mask"].flip(0), "attn.relative_position_index": torch.zeros(16, 16)}
    for kwargs, state_dict, message in (
        ({"shift_size": 0}, state, r"attn_mask must be that of window \[4, 4\] and shift \[0, 0\], got another one"),
        ({"shift_size": 1}, state, r"attn_mask must be that of window \[4, 4\] and shift \[1, 1\], got another one"),
        ({"window_size": 6}, state, r"attn.relative_position_index must be that of window \[6, 6\], \[36, 36\], got"),
        ({"window_size": 6}, state, r"attn_mask must be that of window \[6, 6\] and shift \[2, 2\], got another one"),
        ({}, other, "attn_mask must be that of window"),
        ({}, other, "attn.relative_position_index must be that of window"),
    ):
        with pytest.raises(RuntimeError, match=message):
            SwinTransformerBlock(**{**SHIFTED, **kwargs}).load_state_dict(state_dict, strict=True)


def test_block_takes_tokens():
    ours, theirs = pair_of_blocks(**SHIFTED)
    x = torch.randn(2, 96, 24, generator=torch.Generator().manual_seed(4))
    as_map = lambda m, x: m(x.unflatten(1, (8, 12))).flatten(1, 2)
    check_against_timm(ours, theirs, x, None, as_map)
    with pytest.raises(
        ValueError, match=r"x must be \[B, H, W, C\], or \[B, 96, C\] for input_resolution \[8, 12\], got"
    ):
        ours(x[:, :95])


def softmax_attention(m, x):
    """The formula, with Microsoft's scale of the scores."""
    q, k, v = m.qkv(x).unflatten(-1, (3, m.num_heads, -1)).permute(2, 0, 3, 1, 4)
    places = torch.cartesian_prod(*(torch.arange(w) for w in m.window_size))
    dy, dx = (places[:, None] - places[None] + torch.tensor(m.window_size) - 1).unbind(-1)
    bias = m.relative_position_bias_table[dy * (2 * m.window_size[1] - 1) + dx].permute(2, 0, 1)
    return m.proj(((0.3 * q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_scale(dtype):
    m = randomise(WindowAttention(24, num_heads=3, window_size=(3, 5), qk_scale=0.3)).to(dtype)
    check(m, softmax_attention, tokens(4, 15, 24, dtype=dtype))
    assert WindowAttention(24, 3).scale == 8**-0.5
    assert SwinTransformerBlock(24, (8, 8), 3, qk_scale=0.3).attn.scale == 0.3


def test_arguments_of_microsoft():
    block = SwinTransformerBlock(24, (8, 8), 3, drop=0.25)
    assert {m.p for m in block.modules() if isinstance(m, torch.nn.Dropout)} == {0.25, 0.0}
    assert (block.attn.proj_drop.p, block.attn.attn_drop.p, block.mlp.drop1.p, block.mlp.drop2.p) == (
        0.25,
        0,
        0.25,
        0.25,
    )
    with pytest.raises(ValueError, match="proj_drop must be 0 where drop is given, got 0.1"):
        SwinTransformerBlock(24, (8, 8), 3, drop=0.25, proj_drop=0.1)
    with pytest.raises(TypeError, match=r"num_heads must be an int, got \(7, 7\): the arguments are in timm's order"):
        WindowAttention(24, (7, 7), 3)


@pytest.mark.parametrize("shift", [(0, 0), (2, 1)], ids=str)
def test_quantised_projections(shift):
    """Also on a padded map: what padded tokens contain is what the quantised projection makes of zeros."""
    check_quantised(
        randomise(WindowAttention(24, num_heads=3, window_size=(3, 5), qk_scale=0.3)),
        softmax_attention,
        tokens(4, 15, 24),
    )
    m, x, seen = quantised(randomise(WindowAttention(24, 3, window_size=4))), tokens(2, 9, 7, 24), []
    m.proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        m(x, shift=shift)
        m._forward_map_eager(x, shift, True)
    windows = seen[1].unflatten(0, (2, 3, 2)).unflatten(3, (4, 4)).transpose(2, 3)
    torch.testing.assert_close(seen[0], windows.flatten(3, 4).flatten(1, 2)[:, :9, :7].roll(shift, (1, 2)))
