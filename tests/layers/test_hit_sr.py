"""effvit.layers.SCC and HierarchicalTransformerBlock against HiT-SR's formula with every correlation map formed."""

import functools

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, check_quantised, quantised, randomise, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import (
    SCC,
    ConvFFN,
    ConvHierarchicalTransformerBlock,
    HierarchicalTransformerBlock,
    NGramContext,
    NGramHierarchicalTransformerBlock,
    NGramSCC,
    NGramWindowPartition,
)

DIM, HEADS, BASE = 80, 4, (4, 4)
WINDOWS = {
    "below the base window": (2, 2),
    "the base window": (4, 4),
    "four cells": (8, 8),
    "non-square cells": (8, 4),
    "below on one axis": (2, 8),
}


def reflected(size, padded):
    """Which row of the map every row of the padded map is."""
    period = max(2 * size - 2, 1)
    return torch.tensor([min(i % period, period - i % period) if size > 1 else 0 for i in range(padded)])


def mean_bias(m, of_pairs=False):
    """[heads, L, m]: the bias of every pair of tokens, averaged over the keys of each cell. The same for all pairs of
    one relative position, or computed for each: then gradients are sums in another order."""
    wh, ww = m.window_size
    rows, columns = torch.meshgrid(torch.arange(wh), torch.arange(ww), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=-1)
    relative = places[:, None] - places[None]  # [L, L, 2]
    kinds, index = relative.flatten(0, 1), slice(None)
    if not of_pairs:
        kinds, index = kinds.unique(dim=0, return_inverse=True)
    bias = m.pos(kinds.to(m.qv.linear.weight.dtype))[index].unflatten(0, (wh * ww, wh * ww))
    bias = bias.reshape(wh * ww, m.base_win_size[0], m.cell[0], m.base_win_size[1], m.cell[1], HEADS)
    return bias.mean((2, 4)).flatten(1, 2).permute(2, 0, 1)


def softmax_attention(m, x):
    """Of windows [n, N, c], as Swin has it."""
    q, k, v = m.qkv(x).unflatten(-1, (3, m.num_heads, -1)).permute(2, 0, 3, 1, 4)
    places = torch.cartesian_prod(*(torch.arange(w) for w in m.window_size))
    dy, dx = (places[:, None] - places[None] + torch.tensor(m.window_size) - 1).unbind(-1)
    bias = m.relative_position_bias_table[dy * (2 * m.window_size[1] - 1) + dx].permute(2, 0, 1)
    attn = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)
    return m.proj((attn.to(v.dtype) @ v).transpose(1, 2).flatten(2))


def ngram_context(m, x):
    """[B, H, W, C] -> [B, h, w, C]: every group of neighbouring windows by itself."""
    (B, H, W, C), n = x.shape, m.ngram
    maps = m.unigram_embed(x.permute(0, 3, 1, 2).reshape(-1, 2, H, W))
    maps = maps.reshape(B, C // 2, *maps.shape[2:])
    h, w = maps.shape[2:]
    contexts = []
    for back in (False, True):
        if m.padding_mode == "zero_pad":
            padded = torch.nn.functional.pad(maps, (n - 1, 0, n - 1, 0) if back else (0, n - 1, 0, n - 1))
        else:
            near, far = list(range(1, n)), lambda size: list(range(size - n, size - 1))
            rows, columns = (near + list(range(s)) if back else list(range(s)) + far(s) for s in (h, w))
            padded = maps[:, :, rows][:, :, :, columns]
        groups = torch.stack([padded[:, :, i : i + h, j : j + w] for i in range(n) for j in range(n)], dim=1)
        attended = softmax_attention(m.ngram_attn, groups.permute(0, 3, 4, 1, 2).reshape(-1, n * n, C // 2))
        contexts.append(attended.mean(1).reshape(B, h, w, C // 2))
    return m.merge(torch.cat(contexts, dim=-1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def scc(m, x, of_pairs=False, even=False):
    """Padded to whole windows, `even` numbers of them; with the context of their neighbours where m is an NGramSCC."""
    (B, H, W, C), (wh, ww) = x.shape, m.window_size
    h, w = (-(-size // (window * (1 + even))) * (1 + even) for size, window in ((H, wh), (W, ww)))
    x = x[:, reflected(H, h * wh)][:, :, reflected(W, w * ww)]
    qv = m.qv.conv(x.permute(0, 3, 1, 2).contiguous()) * m.qv.linear(x.permute(0, 3, 1, 2).contiguous())
    if isinstance(m, NGramSCC):
        context = ngram_context(m.ngram_window_partition.ngram_context, qv.permute(0, 2, 3, 1))
        qv = qv + context.permute(0, 3, 1, 2).repeat_interleave(wh, 2).repeat_interleave(ww, 3)
    windows = qv.unfold(2, wh, wh).unfold(3, ww, ww)  # [B, C, h, w, wh, ww]
    q, v = windows.permute(0, 2, 3, 4, 5, 1).reshape(B * h * w, wh * ww, 2, HEADS, -1).permute(2, 0, 3, 1, 4)
    (mh, mw), (rh, rw) = m.base_win_size, m.cell
    cells = v.reshape(*v.shape[:2], mh, rh, mw, rw, -1).permute(0, 1, 2, 4, 6, 3, 5).flatten(-2)
    p = m.spatial_linear(cells).squeeze(-1).flatten(2, 3)  # [windows, heads, m, c]
    spatial = ((q @ p.mT) / q.shape[-1] + mean_bias(m, of_pairs)) @ p
    merged_q, merged_v = (t.transpose(1, 2).flatten(2) for t in (q, v))
    channel = ((merged_q.mT @ merged_v / (wh * ww)) @ merged_v.mT).mT
    out = torch.cat([spatial.transpose(1, 2).flatten(2).to(channel.dtype), channel], dim=-1)
    out = out.reshape(B, h, w, wh, ww, C).transpose(2, 3).reshape(B, h * wh, w * ww, C)
    return m.proj(out[:, :H, :W])


def conv_ffn(m, x, size):
    x = torch.nn.functional.gelu(m.fc1(x))
    maps = x.mT.reshape(len(x), -1, *size)
    return m.fc2(x + torch.nn.functional.gelu(m.dwconv.depthwise_conv[0](maps)).flatten(2).mT)


def block(m, x, size, of_pairs=False):
    even = isinstance(m, NGramHierarchicalTransformerBlock)
    x = x + m.norm1(scc(m.correlation, x.unflatten(1, size), of_pairs, even).flatten(1, 2))
    if isinstance(m, ConvHierarchicalTransformerBlock):
        return x + m.norm2(conv_ffn(m.mlp, x, size))
    return x + m.norm2(m.mlp.fc2(torch.nn.functional.gelu(m.mlp.fc1(x))))


BLOCKS = {
    "HiT-SIR": HierarchicalTransformerBlock,
    "HiT-SRF": ConvHierarchicalTransformerBlock,
    "HiT-SNG": NGramHierarchicalTransformerBlock,
}


def make(window=(8, 8), **factory):
    return SCC(DIM, BASE, window, HEADS, **factory)


def prepared(window=(8, 8)):
    """Smaller parameters where the window sums over more tokens: the output stays near 1."""
    return randomise(make(window), scale=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(8, 16), (9, 13)], ids=["divisible", "padded"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_like_the_formula(window, size, dtype):
    check(prepared(window).to(dtype), scc, tokens(2, *size, DIM, dtype=dtype))


@pytest.mark.parametrize("size", [(1, 1), (3, 20), (2, 9)], ids=str)
def test_padding_beyond_the_map(size):
    """Windows of more than twice the map: it is reflected back and forth."""
    check(prepared(), scc, tokens(2, *size, DIM))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", BLOCKS.values(), ids=BLOCKS.keys())
def test_block_like_the_formula(kind, train, dtype):
    m = kind(DIM, (8, 8), HEADS, BASE, (8, 8), mlp_ratio=2)
    m = randomise(m, scale=0.1).to(dtype).train(train)
    call = lambda m, x: m(x, (9, 5), (8, 8))
    plain, also = (functools.partial(block, size=(9, 5), of_pairs=of_pairs) for of_pairs in (False, True))
    check(m, plain, tokens(2, 45, DIM, dtype=dtype), also=[also], call=call)


def test_autocast():
    check(prepared(), scc, tokens(2, 9, 13, DIM), autocast=torch.bfloat16)


def test_dropout_of_values():
    """Every value dropped: what is left is the projection's bias; none in eval."""
    m = randomise(SCC(DIM, BASE, (8, 8), HEADS, value_drop=1.0), scale=0.1)
    x = tokens(2, 8, 8, DIM)
    torch.testing.assert_close(m(x), m.proj.bias.expand(2, 8, 8, DIM))
    m.eval()
    torch.testing.assert_close(m(x), scc(m, x), rtol=1e-4, atol=1e-4)
    m = SCC(DIM, BASE, (8, 8), HEADS, proj_drop=1.0)
    assert not m(x).any() and m.eval()(x).any()


def test_no_bias_of_all_pairs_is_formed(monkeypatch):
    m, sizes = make((16, 16)), []
    right = torch.Tensor.__getitem__
    monkeypatch.setattr(torch.Tensor, "__getitem__", lambda t, i: sizes.append(right(t, i).numel()) or right(t, i))
    like = torch.empty(0)
    torch.testing.assert_close(m.position_bias(like), mean_bias(m), rtol=1e-4, atol=1e-5)
    assert 256 * 16 * HEADS in sizes  # [heads, L, m] by the module; [L, L] is of the formula here
    sizes.clear()
    m.position_bias(like)
    assert max(sizes) == 256 * 16 * HEADS


def test_state_dict_is_the_originals():
    layers = ["qv.conv.0", "qv.conv.2", "qv.conv.4", "qv.linear", "proj", "spatial_linear", "pos.pos_proj"]
    layers += [f"pos.pos{i}.{j}" for i in (1, 2, 3) for j in (0, 2)]
    assert list(make().state_dict()) == [f"{name}.{kind}" for name in layers for kind in ("weight", "bias")]
    names = {name.split(".")[0] for name in HierarchicalTransformerBlock(DIM, 8, HEADS, BASE, 8).state_dict()}
    assert names == {"norm1", "correlation", "norm2", "mlp"}
    layers = ["fc1", "dwconv.depthwise_conv.0", "fc2"]
    assert list(ConvFFN(8).state_dict()) == [f"{name}.{kind}" for name in layers for kind in ("weight", "bias")]
    context = ["ngram_attn.relative_position_bias_table", "ngram_attn.relative_position_index"]
    layers = ["unigram_embed", "ngram_attn.qkv", "ngram_attn.proj", "merge"]
    context += [f"{name}.{kind}" for name in layers for kind in ("weight", "bias")]
    assert set(NGramContext(DIM, (8, 8), 2, HEADS).state_dict()) == set(context)
    extra = {f"ngram_window_partition.ngram_context.{name}" for name in context}
    assert set(NGramSCC(DIM, BASE, (8, 8), HEADS).state_dict()) == set(make().state_dict()) | extra


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"window_size must be a multiple of base_win_size \[4, 4\] or below it"):
        make((4, 6))
    with pytest.raises(ValueError, match=r"dim must be a multiple of 2 \* num_heads = 6, got 80"):
        SCC(DIM, BASE, (4, 4), 3)
    with pytest.raises(ValueError, match=r"win_size must be \[8, 8\] like window_size, got \[4, 4\]"):
        HierarchicalTransformerBlock(DIM, (8, 8), HEADS, BASE, (8, 8))(tokens(1, 64, DIM), (8, 8), (4, 4))


# ---- HiT-SNG's context, HiT-SRF's feed-forward network -----------------------------------------------------------

CONTEXTS = {
    "2-grams": {},
    "3-grams": {"ngram": 3},
    "no neighbours": {"ngram": 1},
    "zeros": {"padding_mode": "zero_pad"},
    "windows that are not square": {"window_size": (2, 4)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_ngram_context(kwargs, dtype):
    kwargs = {"window_size": (4, 4), "ngram": 2, **kwargs}
    m = randomise(NGramContext(16, ngram_num_heads=2, **kwargs)).to(dtype)
    check(m, lambda m, x: ngram_context(m, x)[:, :, :, None, None], tokens(2, 12, 16, 16, dtype=dtype))


@pytest.mark.parametrize("shift", [0, 3])
def test_ngram_window_partition(shift):
    m = randomise(NGramWindowPartition(16, (4, 4), 2, 2, shift))

    def formula(m, x):
        context = ngram_context(m.ngram_context, x).repeat_interleave(4, 1).repeat_interleave(4, 2)
        x = (x + context).roll((-shift, -shift), (1, 2))
        return torch.stack([image[y : y + 4, z : z + 4] for image in x for y in (0, 4, 8) for z in (0, 4)])

    check(m, formula, tokens(2, 12, 8, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(8, 16), (9, 13)], ids=["divisible", "padded"])
def test_ngram_scc(size, dtype):
    m = randomise(NGramSCC(DIM, BASE, (4, 4), HEADS), scale=0.1).to(dtype)
    check(m, scc, tokens(2, *size, DIM, dtype=dtype))


def test_context_of_too_few_windows():
    """One window has no neighbour to reflect; the block pads to two, as the original does."""
    with pytest.raises(
        ValueError, match=r"x must have at least 2 windows of \[8, 8\] on each axis, got \[1, 8, 16, 80\]"
    ):
        NGramSCC(DIM, BASE, (8, 8), HEADS)(tokens(1, 8, 16, DIM))
    NGramContext(DIM, (8, 8), 2, HEADS, "zero_pad")(tokens(1, 8, 16, DIM))
    with pytest.raises(ValueError, match="padding_mode must be 'seq_refl_win_pad' or 'zero_pad', got 'reflect'"):
        NGramContext(DIM, (8, 8), 2, HEADS, "reflect")
    block = NGramHierarchicalTransformerBlock(DIM, (8, 8), HEADS, BASE, (8, 8))
    with pytest.raises(ValueError, match=r"effvit::NGramHierarchicalTransformerBlock: win_size must be \[8, 8\]"):
        block(tokens(1, 64, DIM), (8, 8), (4, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_ffn(dtype):
    m = randomise(ConvFFN(24, 40, 20)).to(dtype)
    call = lambda m, x: m(x, (5, 9))
    check(m, lambda m, x: conv_ffn(m, x, (5, 9)), tokens(2, 45, 24, dtype=dtype), call=call)
    assert not ConvFFN(24, drop=1.0)(tokens(2, 45, 24), (5, 9)).any()


@pytest.mark.parametrize("kind", [ConvHierarchicalTransformerBlock, NGramHierarchicalTransformerBlock])
def test_the_rest_of_the_blocks(kind):
    make_one = lambda **factory: kind(DIM, (8, 8), HEADS, BASE, (4, 4), **factory)
    check_everything_else(randomise(make_one(), scale=0.1), make_one, tokens(2, 63, DIM), lambda m, x: m(x, (7, 9)))


@pytest.mark.parametrize("kind", [SCC, NGramSCC])
def test_quantised_projections(kind, monkeypatch):
    # The context by the module: it has projections of its own, in which a rounding may become a step
    monkeypatch.setitem(globals(), "ngram_context", lambda m, x: m(x)[:, :, :, 0, 0])
    check_quantised(randomise(kind(DIM, BASE, (4, 4), HEADS), scale=0.1), scc, tokens(2, 8, 12, DIM))


@pytest.mark.parametrize("kind", BLOCKS.values(), ids=BLOCKS.keys())
def test_quantised_blocks(kind):
    m = quantised(randomise(kind(DIM, (8, 8), HEADS, BASE, (8, 8), mlp_ratio=2), scale=0.1))
    x = tokens(2, 63, DIM)
    with torch.no_grad():
        attended = x + m.norm1(m.correlate(x.unflatten(1, (7, 9))).flatten(1, 2))
        expected = attended + m.norm2(m.feed_forward(attended, (7, 9)))
        assert_bitwise_equal(m(x, (7, 9)), expected)


def test_drop_path():
    m = randomise(HierarchicalTransformerBlock(DIM, (8, 8), HEADS, BASE, (8, 8), drop_path=1.0))
    x = tokens(2, 64, DIM)
    assert_bitwise_equal(m(x, (8, 8)), x)
    assert not torch.equal(m.eval()(x, (8, 8)), x)


@pytest.mark.parametrize("window", [(2, 2), (8, 8)], ids=str)
def test_the_rest(window):
    make_one = lambda **factory: make(window, **factory)
    check_everything_else(prepared(window), make_one, tokens(2, 9, 13, DIM))
