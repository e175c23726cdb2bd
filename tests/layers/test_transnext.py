"""effvit.layers.ConvGLU and AggregatedAttention against TransNeXt's formulas: a plain convolution, all pairs."""

import pytest
import torch
import torch.nn.functional as F
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens
from torch import nn

from effvit.layers import AggregatedAttention, ConvGLU, get_relative_position_cpb

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


# ---- aggregated attention ------------------------------------------------------------------------------------------

RATIO = 2
SIZE = (6, 8)
INDEX, TABLE = get_relative_position_cpb(SIZE, (SIZE[0] // RATIO, SIZE[1] // RATIO))


def attend(m, x):
    return m(x, *SIZE, INDEX, TABLE)


def taps(window):
    """[N, N]: which tap of the window around position n position m is; -1: none."""
    y, x = (t.flatten() for t in torch.meshgrid(*map(torch.arange, SIZE), indexing="ij"))
    dy, dx = (t[None, :] - t[:, None] + window // 2 for t in (y, x))
    return torch.where((dy >= 0) & (dy < window) & (dx >= 0) & (dx < window), dy * window + dx, -1)


def plain_attention(m, x):
    """All pairs of positions; those that are not in the window of each other have no part."""
    B, N, h = len(x), SIZE[0] * SIZE[1], m.num_heads
    heads = lambda t: t.unflatten(-1, (h, -1)).transpose(1, 2)
    tap = taps(m.window_size)
    near = tap >= 0
    q = F.normalize(heads(m.q(x)), dim=-1)
    counts = near.sum(-1, keepdim=True) + m.pool_len
    s = q + spread(m, "query_embedding", q.shape)
    s = s * F.softplus(spread(m, "temperature", (B, h, N, 1))) * counts.float().log().to(x.dtype)
    k, v = map(heads, m.kv(x).chunk(2, dim=-1))
    maps = m.act(m.sr(x.mT.unflatten(2, SIZE)))
    pooled = maps.unflatten(3, (-1, RATIO)).unflatten(2, (-1, RATIO)).mean((3, 5)).flatten(2).mT
    k_pool, v_pool = map(heads, m.kv(m.norm(pooled)).chunk(2, dim=-1))
    local_bias = spread(m, "relative_pos_bias_local", (B, N, h, m.local_len)).transpose(1, 2)
    scores = s @ F.normalize(k, dim=-1).mT + local_bias.gather(-1, tap.clamp(min=0).expand(B, h, N, N))
    bias = m.cpb_fc2(m.cpb_fc1(TABLE.to(x.dtype)).relu())[INDEX].unflatten(0, (N, -1)).permute(2, 0, 1)
    scores = torch.cat((scores.masked_fill(~near, -torch.inf), s @ F.normalize(k_pool, dim=-1).mT + bias), -1)
    a, b = scores.softmax(-1).split((N, m.pool_len), -1)
    extra = q @ spread(m, "learnable_tokens", (B, *m.learnable_tokens.shape))
    extra = extra + spread(m, "learnable_bias", (B, h, N, m.local_len))
    a = a + torch.where(near, extra.gather(-1, tap.clamp(min=0).expand(B, h, N, N)), 0)
    return m.proj((a @ v + b @ v_pool).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window, bias", [(3, True), (5, False)])
def test_attention_like_the_formula(window, bias, dtype):
    m = randomise(AggregatedAttention(C, SIZE, 3, window, bias, sr_ratio=RATIO)).to(dtype)
    check(m, plain_attention, tokens(2, SIZE[0] * SIZE[1], C, dtype=dtype), call=attend)


def test_everything_else_of_attention():
    make = lambda **factory: AggregatedAttention(C, SIZE, 2, sr_ratio=RATIO, **factory)
    check_everything_else(randomise(make()), make, tokens(2, SIZE[0] * SIZE[1], C), call=attend)


def test_keys_of_attention():
    """Those of the original's state_dict, and its initial temperature."""
    m = AggregatedAttention(C, SIZE, 2, sr_ratio=RATIO)
    linear = {f"{n}.{p}" for n in ("q", "kv", "proj", "sr", "norm", "cpb_fc1", "cpb_fc2") for p in ("weight", "bias")}
    own = {"temperature", "query_embedding", "relative_pos_bias_local", "learnable_tokens", "learnable_bias"}
    assert m.state_dict().keys() == linear | own
    assert m.learnable_tokens.shape == (2, C // 2, 9) and m.learnable_bias.shape == (2, 1, 9)
    torch.testing.assert_close(F.softplus(m.temperature), torch.full((2, 1, 1), 1 / 0.24))


def test_dropout_of_attention():
    """Weights are dropped in training, of which the mean over many draws is the attention without."""
    torch.manual_seed(0)
    m = randomise(AggregatedAttention(C, SIZE, 2, attn_drop=0.3, sr_ratio=RATIO))
    x = tokens(1, SIZE[0] * SIZE[1], C)
    with torch.no_grad():
        expected = attend(m.eval(), x)
        drawn = torch.stack([attend(m.train(), x) for _ in range(200)])
    assert drawn.std(0).min() > 0
    assert float((drawn.mean(0) - expected).abs().max()) < 6 * float(drawn.std(0).max()) / 200**0.5


def test_positions_of_one_row():
    index, table = get_relative_position_cpb((1, 7), (1, 1))
    assert index.shape == (7,) and torch.isfinite(table).all() and (table[:, 0] == 0).all()


def test_relative_positions():
    """The table's rows are offsets to pooled positions in eighths of the map, on a logarithmic scale."""
    index, table = get_relative_position_cpb((4, 6), (2, 3), (8, 8))
    pairs = table[index].view(4, 6, 2, 3, 2)
    offset = (3 - 0.5) / 7 * 8  # from row 3 to the first pooled one, the mean of rows 0 and 1
    torch.testing.assert_close(pairs[3, 2, 0, 1, 0], torch.log2(torch.tensor(offset + 1)) / 3)
    torch.testing.assert_close(pairs[3, 2, 0, 1, 1], -torch.log2(torch.tensor((2.5 - 2) / 7 * 8 + 1)) / 3)
    assert len(torch.unique(table, dim=0)) == len(table)


def test_errors_of_attention():
    m = AggregatedAttention(C, SIZE, 2, sr_ratio=RATIO)
    with pytest.raises(ValueError, match=r"effvit::AggregatedAttention: x must be \[B, 48, C\] of a map 6 x 8, got"):
        m(tokens(1, 36, C), 6, 6, INDEX, TABLE)
    with pytest.raises(ValueError, match="effvit::AggregatedAttention: window_size must be 3, 5 or 7, got 4"):
        AggregatedAttention(C, SIZE, 2, window_size=4)
