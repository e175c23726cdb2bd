"""effvit.layers' L2ViT modules against the paper's formulas: linear global attention, local concentration, block."""

import copy

import pytest
import torch
from layer_suite import DTYPES, attend, check, check_everything_else, check_forms, randomise, tokens

from effvit.layers import LCM, LGABlock, LinearGlobalAttention

SIZE = (5, 7)


def heads_of(m, x):
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in m.qkv(x).chunk(3, dim=-1))
    return q.relu(), k.relu(), v


def plain(m, x, form="pairs"):
    """Scores over their sum, which counts as 100 where it is less, and a temperature per head."""
    out = attend(*heads_of(m, x), lambda s: s.clamp(min=100), form=form)
    return m.proj((out * m.temperature.to(out.dtype)).transpose(1, 2).flatten(2))


def conv(c, x, size=SIZE):
    return c(x.transpose(1, 2).unflatten(-1, size)).flatten(2).transpose(1, 2)


def plain_lcm(m, x):
    return conv(lambda t: m.conv2(m.bn(m.act(m.conv1(t)))), x)


def plain_block(m, x, form="pairs"):
    x = x + m.cpe[0].activation(conv(m.cpe[0].proj, x))
    x = x + plain(m.attn, m.norm1(x), form)
    if m.local_mp is not None:
        x = x + plain_lcm(m.local_mp, m.norm3(x))
    return x + m.mlp.fc2(m.mlp.act(m.mlp.fc1(m.norm2(x)))) if m.ffn else x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [35, 6], ids=["linear form", "quadratic form"])
@pytest.mark.parametrize("scale", [0.1, 0.35, 1.0], ids=["all clamped", "some clamped", "none clamped"])
def test_attention(scale, size, dtype):
    m = randomise(LinearGlobalAttention(24, 3, qkv_bias=True), scale=scale)
    x = tokens(3, size, 24)
    with torch.no_grad():
        m.qkv.weight.mul_((35 / size) ** 0.5)
        if scale == 1.0:
            m.qkv.bias.add_(4)
        q, k, _ = heads_of(m, x)
    sums = (q @ k.transpose(-1, -2)).sum(-1)
    least, most = sums.min(), sums.max()
    assert {0.1: most < 90, 0.35: least < 90 and most > 110, 1.0: least > 110}[scale]
    check_forms(m.to(dtype), plain, x.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_local_concentration(train, dtype):
    m = randomise(LCM(12)).train(train).to(dtype)
    check(m, plain_lcm, tokens(3, 35, 12, dtype=dtype), call=lambda m, x: m(x, SIZE))


BLOCKS = {"plain": {}, "enhanced": {"enhanced": True, "cpe_act": True}, "no ffn": {"ffn": False}}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kwargs", BLOCKS.values(), ids=BLOCKS.keys())
def test_block(kwargs, train, dtype):
    m = randomise(LGABlock(24, 3, mlp_ratio=2.0, **kwargs), scale=0.3).train(train).to(dtype)
    check_forms(m, plain_block, tokens(3, 35, 24, dtype=dtype), call=lambda m, x: m(x, SIZE)[0])


def test_block_returns_the_size_for_the_next():
    m = LGABlock(24, 3)
    x, size = m(tokens(2, 12, 24), (3, 4))
    assert size == (3, 4) and m(x, size)[0].shape == (2, 12, 24)


def test_autocast():
    m = randomise(LinearGlobalAttention(24, 3), scale=0.3)
    check_forms(m, plain, tokens(2, 35, 24), autocast=torch.bfloat16)
    m = randomise(LGABlock(24, 3, enhanced=True), scale=0.3).eval()
    check_forms(m, plain_block, tokens(2, 35, 24), autocast=torch.bfloat16, call=lambda m, x: m(x, SIZE)[0])


def test_initial_temperature():
    assert LinearGlobalAttention(64, 4).temperature.flatten().tolist() == [0.25] * 4
    assert LinearGlobalAttention(64, 4, qk_scale=0.5).temperature.flatten().tolist() == [0.5] * 4


def test_parameter_names_are_the_originals():
    attention = {"temperature", "qkv.weight", "proj.weight", "proj.bias"}
    assert set(LinearGlobalAttention(24, 3).state_dict()) == attention
    bn = {f"bn.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    lcm = {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"} | bn
    assert set(LCM(24).state_dict()) == lcm
    parts = ("cpe.0.proj", "norm1", "norm2", "norm3", "mlp.fc1", "mlp.fc2")
    names = {f"{part}.{name}" for part in parts for name in ("weight", "bias")} | {"attn.qkv.bias"}
    names |= {f"attn.{name}" for name in attention} | {f"local_mp.{name}" for name in lcm}
    assert set(LGABlock(24, 3, enhanced=True).state_dict()) == names


def test_dropout_and_stochastic_depth_are_active_in_training_only():
    x = tokens(32, 6, 8)
    for m in (LinearGlobalAttention(8, 1, proj_drop=0.5), LGABlock(8, 1, drop_path=0.5)):
        call = m if isinstance(m, LinearGlobalAttention) else lambda x, m=m: m(x, (2, 3))[0]
        assert not torch.equal(call(x), call(x))
        m.eval()
        assert torch.equal(call(x), call(x))
    assert copy.deepcopy(m).drop_path.drop_prob == 0.5


@pytest.mark.parametrize("make, call", [
    (lambda **factory: LinearGlobalAttention(24, 3, **factory), None),
    (lambda **factory: LCM(24, **factory), lambda m, x: m(x, SIZE)),
    (lambda **factory: LGABlock(24, 3, enhanced=True, **factory), lambda m, x: m(x, SIZE)[0]),
], ids=["attention", "LCM", "block"])  # fmt: skip
def test_the_rest(make, call):
    check_everything_else(randomise(make()), make, tokens(2, 35, 24), call)
