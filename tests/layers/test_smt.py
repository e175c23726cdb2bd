"""effvit.layers.ScaleAwareModulation against SMT's formula, channel by channel."""

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, randomise, tokens

from effvit.layers import ScaleAwareModulation

H, W, DIM = 4, 5, 16


def as_map(x):
    return x.mT.reshape(len(x), -1, H, W)


def modulated(m, x):
    """Channel c * heads + i of the heads' maps is channel c of head i."""
    size = DIM // m.ca_num_heads
    heads = [
        getattr(m, f"local_conv_{i + 1}")(as_map(m.s(x)[..., i * size : (i + 1) * size])) for i in range(m.ca_num_heads)
    ]
    maps = torch.cat([head[:, c : c + 1] for c in range(size) for head in heads], dim=1)
    y = m.bn(m.proj0(maps))
    y = m.proj1(y * 0.5 * (1 + torch.erf(y * 0.5**0.5)))
    return m.proj(y.flatten(2).mT * m.v(x))


def attention(m, x):
    q = m.q(x).reshape(*x.shape[:2], m.sa_num_heads, -1).transpose(1, 2)
    k, v = m.kv(x).reshape(*x.shape[:2], 2, m.sa_num_heads, -1).permute(2, 0, 3, 1, 4)
    y = ((q @ k.mT * m.scale).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return m.proj(y + m.local_conv(as_map(v.transpose(1, 2).flatten(2))).flatten(2).mT)


def call(m, x):
    return m(x, H, W)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_like_the_formula(train, dtype):
    m = randomise(ScaleAwareModulation(DIM, qkv_bias=True)).to(dtype).train(train)
    check(m, modulated, tokens(2, H * W, DIM, dtype=dtype), call=call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_late_stages(dtype):
    m = randomise(ScaleAwareModulation(DIM, ca_attention=0, sa_num_heads=2, qk_scale=0.3)).to(dtype)
    check(m, attention, tokens(2, H * W, DIM, dtype=dtype), call=call)


def test_parameter_names_are_the_originals():
    both = lambda *names: {f"{name}.{p}" for name in names for p in ("weight", "bias")}
    names = both("proj", "proj0", "proj1", "bn", *(f"local_conv_{i}" for i in (1, 2, 3, 4)))
    names |= {"v.weight", "s.weight", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    m = ScaleAwareModulation(DIM)
    assert set(m.state_dict()) == names and m.proj0.weight.shape == (2 * DIM, 4, 1, 1)
    names = both("proj", "local_conv") | {"q.weight", "kv.weight"}
    assert set(ScaleAwareModulation(DIM, ca_attention=0).state_dict()) == names


def test_bad_arguments():
    for kwargs, heads in (({}, 4), ({"ca_attention": 0}, 8)):
        with pytest.raises(
            ValueError, match=f"ScaleAwareModulation: dim must be a multiple of num_heads {heads}, got 18"
        ):
            ScaleAwareModulation(18, **kwargs)


def test_dropout_is_active_in_training_only():
    m, x = randomise(ScaleAwareModulation(DIM, ca_attention=0, attn_drop=0.5)), tokens(2, H * W, DIM)
    assert not torch.equal(call(m, x), call(m, x))
    assert torch.equal(call(m.eval(), x), call(m, x))


def test_the_rest():
    make = lambda **factory: ScaleAwareModulation(DIM, **factory)
    check_everything_else(randomise(make(), scale=0.2), make, tokens(2, H * W, DIM), call)
