"""effvit.layers.AdditiveTokenMixer and AdditiveBlock against CAS-ViT's formula."""

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, randomise, tokens

from effvit.layers import AdditiveBlock, AdditiveTokenMixer

SHAPE = (2, 8, 5, 6)


def operated(parts, x):
    spatial, channel = parts
    depthwise, norm, _, pointwise, _ = spatial.block
    x = x / (1 + (-pointwise(norm(depthwise(x)).relu())).exp())
    return x / (1 + (-channel.block[1](x.mean((2, 3), keepdim=True))).exp())


def mixer(m, x):
    q, k, v = m.qkv(x).split(x.shape[1], dim=1)
    return m.proj(m.dwc(operated(m.oper_q, q) + operated(m.oper_k, k)) * v)


def block(m, x):
    first, norm, depthwise, _, last = m.local_perception.network
    x = x + last(depthwise(norm(first(x))).relu())
    x = x + mixer(m.attn, m.norm1(x))
    return x + m.mlp.fc2(m.mlp.fc1(m.norm2(x)).relu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_like_the_formula(train, dtype):
    m = randomise(AdditiveTokenMixer(8, attn_bias=True)).to(dtype).train(train)
    check(m, mixer, tokens(*SHAPE, dtype=dtype), is_map=True)


def test_block_like_the_formula():
    check(randomise(AdditiveBlock(8, mlp_ratio=2.0), scale=0.3).eval(), block, tokens(*SHAPE), is_map=True)


def test_parameter_names_are_the_originals():
    both = lambda *names: {f"{name}.{p}" for name in names for p in ("weight", "bias")}
    norm = lambda name: {
        f"{name}.{p}" for p in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    names = {"qkv.weight"} | both("dwc", "proj")
    for part in ("oper_q", "oper_k"):
        names |= both(f"{part}.0.block.0") | norm(f"{part}.0.block.1")
        names |= {f"{part}.0.block.3.weight", f"{part}.1.block.1.weight"}
    assert set(AdditiveTokenMixer(8).state_dict()) == names
    names = {f"attn.{name}" for name in names} | both("mlp.fc1", "mlp.fc2") | norm("norm1") | norm("norm2")
    names |= both(*(f"local_perception.network.{i}" for i in (0, 2, 4))) | norm("local_perception.network.1")
    assert set(AdditiveBlock(8).state_dict()) == names


def test_stochastic_depth_is_active_in_training_only():
    m, x = randomise(AdditiveBlock(8, drop_path=0.5)), tokens(16, 8, 2, 3)
    assert not torch.equal(m(x), m(x))
    assert torch.equal(m.eval()(x), m(x))


@pytest.mark.parametrize("make", [
    lambda **factory: AdditiveTokenMixer(8, **factory), lambda **factory: AdditiveBlock(8, **factory),
], ids=["mixer", "block"])  # fmt: skip
def test_the_rest(make):
    check_everything_else(randomise(make(), scale=0.3), make, tokens(*SHAPE))
