"""effvit.layers.MultiScaleAttentionBlock against Atlas' formula: all pairs of tokens of all scales, masked."""

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, randomise, tokens

from effvit.layers import MultiScaleAttentionBlock

DIM, SIDE = 8, 16
SIZES = {"num_heads": 2, "resolution": SIDE, "mlp_ratio": 2.0, "merge_ratio": 4, "local2global": 2}


def sides(m):
    return [layout["grid_size"][0] * layout["window"] for layout in m.multiscale_layout]


def pooled(x, side, by):
    """Maxima over by x by tokens of [B, side * side, C]."""
    x = x.reshape(len(x), side // by, by, side // by, by, -1)
    return x.amax((2, 4)).flatten(1, 2)


def blocks_of(side, size):
    """The number of the size x size block of every token of a map, row by row."""
    n = torch.arange(side) // size
    return (n[:, None] * (side // size) + n).flatten()


def attend(attn, q, kv, seen):
    heads = lambda t: t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    k, v = torch.cat(kv, dim=1).chunk(2, dim=-1)
    q, k, v = heads(q), heads(k), heads(v)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return attn.proj((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))


def mlp(block, x):
    y = block.mlp.fc1(block.norm2(x))
    return x + block.mlp.fc2(y * 0.5 * (1 + torch.erf(y * 0.5**0.5)))


def plain(m, x):
    """x [B, SIDE * SIDE, C] -> all scales in a row, each in the order of its map."""
    scales = [x]
    for side in sides(m)[:-1]:
        scales.append(pooled(scales[-1], side, m.local2global))
    window = m.merge_ratio
    for i, side in enumerate(sides(m)):
        n = torch.arange(side) % window
        axis = (n.to(x.dtype) - window // 2) / (window // 2)
        place = torch.stack([axis[:, None].expand(side, side), axis.expand(side, side)], -1).flatten(0, 1)
        first, _, last = m.posemb[i].projector
        scales[i] = scales[i] + last(first(place).relu())
    for i, side in enumerate(sides(m)[:-1]):
        scales[i + 1] = scales[i + 1] + pooled(scales[i], side, m.local2global)
    kv = lambda i: m.blocks[i].attn.kv(m.blocks[i].norm1_kv(scales[i]))
    own = [blocks_of(side, window) for side in sides(m)]
    count = [(side // window) ** 2 for side in sides(m)]
    for i in reversed(range(len(scales))):
        block, keys, seen = m.blocks[i], [kv(i)], [own[i][:, None] == own[i]]
        for j in range(i + 1, len(scales)):
            keys.append(kv(j))
            seen.append((own[i] * count[j] // count[i])[:, None] == own[j])
        q = block.attn.q(block.norm1_q(scales[i]))
        scales[i] = mlp(block, scales[i] + attend(block.attn, q, keys, torch.cat(seen, 1)))
    for i in range(1, len(scales)):
        block = m.blocks[i]
        summarised = blocks_of(sides(m)[i], sides(m)[i] * window // sides(m)[i - 1])
        q = block.attn.q(block.norm1_q(scales[i]))
        mixed = attend(block.attn, q, [kv(i - 1)], summarised[:, None] == own[i - 1])
        scales[i] = mlp(block, scales[i] + mixed)
    return torch.cat(scales, 1)


def call(m, x):
    scales = m(m.tokens(x.unflatten(1, (sides(m)[0],) * 2)))
    return torch.cat([m._map(t, i).flatten(1, 2) for i, t in enumerate(scales)], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("resolution", [16, 8, 4])
def test_like_the_formula(resolution, dtype):
    m = randomise(MultiScaleAttentionBlock(DIM, **(SIZES | {"resolution": resolution})), scale=0.3).to(dtype)
    assert len(m.blocks) == {16: 3, 8: 2, 4: 1}[resolution]
    check(m, plain, tokens(2, resolution**2, DIM, dtype=dtype), call=call)


def test_layout():
    """Windows of 16 tokens a side, from scale to scale a quarter of the map's: the models at 1024 and 2048 pixels."""
    grids = lambda n: [t["grid_size"] for t in MultiScaleAttentionBlock(8, 1, n, device="meta").multiscale_layout]
    assert grids(64) == [(4, 4), (1, 1)]
    assert grids(128) == [(8, 8), (2, 2), (1, 1)]
    m = MultiScaleAttentionBlock(8, 1, 128, device="meta")
    assert [t.shape for t in m.tokens(torch.empty(2, 128, 128, 8))] == [(128, 256, 8), (8, 256, 8), (2, 64, 8)]


def test_parameter_names_are_the_originals():
    names = set()
    for i in range(3):
        parts = ("norm1_q", "norm1_kv", "attn.q", "attn.kv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        names |= {f"blocks.{i}.{part}.{p}" for part in parts for p in ("weight", "bias")}
        names |= {f"posemb.{i}.projector.{p}" for p in ("0.weight", "0.bias", "2.weight")}
    assert set(MultiScaleAttentionBlock(DIM, **SIZES).state_dict()) == names


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_heads": 3}, "dim must be a multiple of num_heads 3, got 8"),
        ({"local2global": 3}, "local2global must be a divisor of 4 above 1, got 3"),
        ({"local2global": 1}, "local2global must be a divisor of 4 above 1, got 1"),
        ({"local2global": 0}, "local2global must be a divisor of 4 above 1, got 0"),
        ({"merge_ratio": 0}, "merge_ratio must be at least 1, got 0"),
        ({"resolution": 18}, "resolution must be such that windows of 4 divide the scales, got 18"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=f"effvit::MultiScaleAttentionBlock: {message}"):
        MultiScaleAttentionBlock(DIM, **(SIZES | kwargs))


def test_dropout_is_active_in_training_only():
    m, x = randomise(MultiScaleAttentionBlock(DIM, **SIZES, attn_drop=0.5, drop_path=0.5)), tokens(4, SIDE**2, DIM)
    assert not torch.equal(call(m, x), call(m, x))
    assert torch.equal(call(m.eval(), x), call(m, x))


def test_the_rest():
    make = lambda **factory: MultiScaleAttentionBlock(DIM, **(SIZES | {"resolution": 8}), **factory)
    check_everything_else(randomise(make(), scale=0.3), make, tokens(2, 64, DIM), call)
