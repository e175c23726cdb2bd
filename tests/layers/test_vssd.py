"""effvit.layers.NonCausalSSD and VMAMBA2Block against VSSD's formula with the matrix of all token pairs."""

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import NonCausalSSD, VMAMBA2Block

H, W = 5, 7
SIZES = {"d_model": 24, "headdim": 12, "d_state": 10}  # 4 heads


def mixer(m, u, H=H, W=W):
    """y_i = sum_j (C_i . B_j) dt_j exp(A_log) x_j + D x_i, head h with the B and C of group h % ngroups."""
    n, d = m.ngroups * m.d_state, m.d_inner
    z, xBC, dt = m.in_proj(u).split([d, d + 2 * n, m.nheads], dim=-1)
    xBC = torch.nn.functional.silu(m.conv2d(xBC.mT.reshape(len(u), -1, H, W))).flatten(2)
    x, B, C = xBC.split([d, n, n], dim=1)
    x = x.unflatten(1, (m.nheads, -1)).mT  # [B, h, L, P]
    groups = torch.arange(m.nheads) % m.ngroups
    B, C = (t.unflatten(1, (m.ngroups, -1)).mT[:, groups] for t in (B, C))  # [B, h, L, N]
    w = torch.log1p((dt + spread(m, "dt_bias", dt.shape)).exp()) * spread(m, "A_log", dt.shape).exp()
    w = w if m.ssd_positve_dA else -w
    pairs = (C @ B.mT) * w.mT[:, :, None, :]
    y = (pairs.to(x.dtype) @ x).transpose(1, 2)
    x = x.transpose(1, 2)
    y = y + spread(m, "D", (*x.mT.shape[:-1], m.nheads)).mT * x
    return m.out_proj(m.norm(y.flatten(2)) * z)


def block(m, x):
    def position(conv, x):
        return x + conv(x.mT.reshape(len(x), -1, H, W)).flatten(2).mT

    x = position(m.cpe1, x)
    if isinstance(m.attn, NonCausalSSD):
        x = x + mixer(m.attn, m.norm1(x))
    else:
        q, k, v = m.attn.to_qkv(m.norm1(x)).reshape(len(x), H * W, 3, m.attn.heads, -1).permute(2, 0, 3, 1, 4)
        p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        x = x + m.attn.to_out((p @ v).transpose(1, 2).flatten(2))
    x = position(m.cpe2, x)
    return x + m.mlp.fc2(torch.nn.functional.gelu(m.mlp.fc1(m.norm2(x))))


def call(m, x):
    return m(x, H, W)


VARIANTS = {
    "one group": {},
    "two groups": {"ngroups": 2},
    "a group per head": {"ngroups": -1},
    "biases, one head": {"headdim": 48, "bias": True, "conv_bias": False, "d_conv": 5},
    "negative A": {"ssd_positve_dA": False, "expand": 1},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, train, dtype):
    m = randomise(NonCausalSSD(**{**SIZES, **kwargs})).to(dtype).train(train)
    check(m, mixer, tokens(3, H * W, 24, dtype=dtype), call=call)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (13, 9)], ids=str)
def test_map_sizes(size):
    m = randomise(NonCausalSSD(**SIZES, ngroups=2)).eval()
    x = tokens(2, size[0] * size[1], 24)
    check(m, lambda m, x: mixer(m, x, *size), x, call=lambda m, x: m(x, *size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"ssd_ngroups": 2}, {"attn_type": "standard"}], ids=["", "groups", "standard"])
def test_block_like_the_formula(kwargs, dtype):
    m = randomise(VMAMBA2Block(24, (H, W), 4, d_state=10, **kwargs), scale=0.2).to(dtype)
    check(m, block, tokens(2, H * W, 24, dtype=dtype))


@pytest.mark.parametrize("ngroups", [1, 2])
def test_autocast(ngroups):
    m = randomise(NonCausalSSD(**SIZES, ngroups=ngroups)).eval()
    check(m, mixer, tokens(2, H * W, 24), autocast=torch.bfloat16, call=call)


def test_a_groups_b_and_c_are_broadcast_over_its_heads_without_a_copy(monkeypatch):
    import effvit.ops

    right, strides = effvit.ops.linear_attention, []

    def spy(q, k, v, **options):
        strides.extend([q.stride(2), k.stride(2)])
        return right(q, k, v, **options)

    monkeypatch.setattr(effvit.ops, "linear_attention", spy)
    for ngroups, calls in ((1, 1), (2, 2)):
        strides.clear()
        call(NonCausalSSD(**SIZES, ngroups=ngroups), tokens(2, H * W, 24))
        assert strides == [0, 0] * calls


def test_initialisation():
    torch.manual_seed(0)
    m = NonCausalSSD(512, headdim=1, d_state=4, dt_min=0.01, dt_max=0.2, A_init_range=(2, 8), conv_init=0.3)
    dt, a = torch.nn.functional.softplus(m.dt_bias), m.A_log.exp()
    assert 0.0099 < dt.min() < 0.011 and 0.19 < dt.max() < 0.201
    assert abs(dt.log().mean() - torch.tensor([0.01, 0.2]).log().mean()) < 0.1  # log-uniform
    assert 2 <= a.min() < 2.1 and 7.9 < a.max() <= 8.001
    assert 0.29 < m.conv2d.weight.abs().max() <= 0.3
    assert all(p._no_weight_decay for p in (m.A_log, m.D, m.dt_bias))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"headdim": 7}, "headdim must be a divisor of expand"),
        ({"ngroups": 3}, "ngroups must be a divisor of the 4 heads, got 3"),
        ({"d_conv": 4}, "d_conv must be odd, got 4"),
        ({"activation": "gelu"}, "activation must be 'silu'"),
        ({"linear_attn_duality": False}, "linear_attn_duality must be True"),
        ({"learnable_init_states": True}, "learnable_init_states must be False"),
        ({"lepe": True}, "lepe must be False"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NonCausalSSD(**{**SIZES, **kwargs})
    with pytest.raises(ValueError, match="attn_type must be 'mamba2' or 'standard', got 'x'"):
        VMAMBA2Block(24, (H, W), 4, attn_type="x")


def test_drop_path_and_the_size_of_the_map():
    m = randomise(VMAMBA2Block(24, (H, W), 4, d_state=10, drop_path=1.0))
    x = tokens(2, H * W, 24)
    position = lambda conv, x: x + conv(x.mT.reshape(2, -1, H, W)).flatten(2).mT
    torch.testing.assert_close(m(x), position(m.cpe2, position(m.cpe1, x)))
    m.eval()
    assert_bitwise_equal(m(x, H, W), m(x))
    assert not torch.equal(m(x, W, H), m(x))
    assert VMAMBA2Block(24, 7, 4, bidirection=True).input_resolution == (7, 7)


@pytest.mark.parametrize("ngroups", [1, 2])
def test_the_rest(ngroups):
    make = lambda **factory: NonCausalSSD(**SIZES, ngroups=ngroups, **factory)
    check_everything_else(randomise(make()), make, tokens(2, H * W, 24), call)


def test_the_rest_of_the_block():
    make = lambda **factory: VMAMBA2Block(24, (H, W), 4, d_state=10, **factory)
    check_everything_else(randomise(make(), scale=0.2), make, tokens(2, H * W, 24))
