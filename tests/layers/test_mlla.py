"""effvit.layers.MLLAttention and MLLABlock against the paper's formula."""

import cmath
import functools

import pytest
import torch
from layer_suite import DTYPES, attend, check_everything_else, check_forms, randomise, tokens

from effvit.layers import MLLABlock, MLLAttention
from effvit.layers.mlla import RoPE


def turn(x, rotations):
    """Channel pairs of x [B, N, C] multiplied by cos + i sin, written out."""
    cos, sin = (r.flatten(0, 1).to(x.dtype) for r in rotations.unbind(-1))  # rotations [H, W, C/2, 2]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def plain(m, x, form="pairs", size=None):
    """Roped scores over un-roped ones."""
    B, N, C = x.shape
    size = m.input_resolution if size is None else size
    q, k = (torch.where(t > 0, t + 1, t.clamp(max=0).exp()) for t in m.qk(x).chunk(2, dim=-1))
    rotations = m.rope.rotations if size == m.input_resolution else RoPE((*size, C)).rotations
    heads = lambda t: t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2).to(x.dtype)
    q_roped, k_roped, q, k = map(heads, (turn(q, rotations), turn(k, rotations) / N, q, k / N))
    out = attend(q_roped, k_roped, heads(x), lambda s: s + 1e-6, q, k, form).transpose(1, 2).flatten(2)
    maps = x.transpose(1, 2).unflatten(-1, size)
    return out + m.lepe(maps).flatten(2).transpose(1, 2)


def plain_block(m, x, form="pairs", size=None):
    size = m.input_resolution if size is None else size
    conv = lambda c, t: c(t.transpose(1, 2).unflatten(-1, size)).flatten(2).transpose(1, 2)
    x = x + conv(m.cpe1, x)
    y = m.norm1(x)
    gate = m.act(m.act_proj(y))
    y = plain(m.attn, m.act(conv(m.dwc, m.in_proj(y))), form, size)
    x = x + m.out_proj(y * gate)
    x = x + conv(m.cpe2, x)
    return x + m.mlp.fc2(m.mlp.act(m.mlp.fc1(m.norm2(x))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(5, 7), (2, 3), (6, 6)], ids=str)
@pytest.mark.parametrize("num_heads", [3, 1])
def test_attention(num_heads, size, dtype):
    m = randomise(MLLAttention(24, size, num_heads)).to(dtype)
    check_forms(m, plain, tokens(3, size[0] * size[1], 24, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block(dtype):
    m = randomise(MLLABlock(24, (5, 7), 3, mlp_ratio=2.0)).to(dtype)
    check_forms(m, plain_block, tokens(3, 35, 24, dtype=dtype))


@pytest.mark.parametrize("make, formula", [(MLLAttention, plain), (MLLABlock, plain_block)], ids=["attention", "block"])
def test_autocast(make, formula):
    check_forms(randomise(make(24, (5, 7), 3)), formula, tokens(2, 35, 24), autocast=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 4), (8, 9), (7, 5)], ids=str)
@pytest.mark.parametrize("make, formula", [(MLLAttention, plain), (MLLABlock, plain_block)], ids=["attention", "block"])
def test_other_sizes(make, formula, size, dtype):
    """Their rotations are float32 in a model of any dtype, where the buffer is rounded to that of the model."""
    m = randomise(make(24, (5, 7), 3)).to(dtype)
    x = tokens(2, size[0] * size[1], 24, dtype=dtype)
    check_forms(m, functools.partial(formula, size=size), x, call=lambda m, x: m(x, size))
    torch.testing.assert_close(m(x.unflatten(1, size)).view(x.shape), m(x, hw_shape=list(size)))
    assert m.state_dict().keys() == make(24, (5, 7), 3).state_dict().keys()


def test_other_sizes_compile():
    m, x = randomise(MLLAttention(24, (5, 7), 3)), tokens(2, 12, 24)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, (3, 4)), m(x, (3, 4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rope", [RoPE((3, 5, 8)), RoPE((9, 2, 8))], ids=["buffer", "another size"])
def test_rotations_by_their_definition(rope):
    rotations = rope.rotations_of((3, 5))
    for y in range(3):
        for x in range(5):
            for i in range(4):  # two frequencies of the row, then two of the column
                angle = (y, x)[i // 2] * 10000.0 ** (-(i % 2) / 2)
                turned = rotations[y, x, i]
                assert complex(*turned.tolist()) == pytest.approx(cmath.exp(1j * angle), abs=1e-6)
    x = tokens(2, 3, 5, 8)
    torch.testing.assert_close(rope(x, rotations).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rope(x, rotations)[:, 0, 0], x[:, 0, 0])
    assert rope(x.bfloat16(), rotations).dtype == torch.float32


def test_maps_and_bad_arguments():
    for m in (MLLAttention(24, (5, 7), 3), MLLABlock(24, (5, 7), 3)):
        x = tokens(2, 35, 24)
        for wrong in (tokens(2, 36, 24), tokens(2, 24)):
            with pytest.raises(ValueError, match=rf"{type(m).__name__}: x must be \[B, 35, C\] or \[B, 5, 7, C\], got"):
                m(wrong)
        for wrong in (x, tokens(2, 7, 5, 24)):
            with pytest.raises(ValueError, match=rf"{type(m).__name__}: x must be \[B, 30, C\] or \[B, 5, 6, C\], got"):
                m(wrong, (5, 6))
        torch.testing.assert_close(m(x.unflatten(1, (5, 7))).view(x.shape), m(x))
    with pytest.raises(ValueError, match=r"RoPE: shape must end in a multiple of 4 channels, got \(5, 7, 6\)"):
        MLLAttention(6, (5, 7), 1)


def test_parameter_names_are_the_originals():
    attention = {"qk.weight", "qk.bias", "lepe.weight", "lepe.bias", "rope.rotations"}
    state = MLLAttention(24, (4, 5), 3).state_dict()
    assert set(state) == attention and state["rope.rotations"].shape == (4, 5, 12, 2)
    parts = ("cpe1", "norm1", "in_proj", "act_proj", "dwc", "out_proj", "cpe2", "norm2", "mlp.fc1", "mlp.fc2")
    names = {f"{part}.{name}" for part in parts for name in ("weight", "bias")}
    assert set(MLLABlock(24, (4, 5), 3).state_dict()) == names | {f"attn.{name}" for name in attention}


def test_stochastic_depth_is_active_in_training_only():
    m, x = randomise(MLLABlock(8, (2, 3), 1, drop_path=0.5)), tokens(32, 6, 8)
    assert not torch.equal(m(x), m(x))
    assert torch.equal(m.eval()(x), m(x))


@pytest.mark.parametrize("make", [
    lambda **factory: MLLAttention(24, (5, 7), 3, **factory), lambda **factory: MLLABlock(24, (5, 7), 3, **factory),
], ids=["attention", "block"])  # fmt: skip
def test_the_rest(make):
    check_everything_else(randomise(make()), make, tokens(2, 35, 24))
