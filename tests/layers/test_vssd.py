"""effvit.layers.NonCausalSSD and VMAMBA2Block against VSSD's formulas: all token pairs, and token after token."""

import functools

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import NonCausalSSD, VMAMBA2Block
from effvit.layers.vssd import ssd_scan

H, W = 5, 7
SIZES = {"d_model": 24, "headdim": 12, "d_state": 10}  # 4 heads


def projected(m, u, H, W):
    """z [B, L, d], x [B, h, L, P], B and C [B, g, L, N], dt [B, L, h] after softplus."""
    n, d = m.ngroups * m.d_state, m.d_inner
    z, xBC, dt = m.in_proj(u).split([d, d + 2 * n, m.nheads], dim=-1)
    xBC = torch.nn.functional.silu(m.conv2d(xBC.mT.reshape(len(u), -1, H, W))).flatten(2)
    x, B, C = xBC.split([d, n, n], dim=1)
    x = x.unflatten(1, (m.nheads, -1)).mT
    B, C = (t.unflatten(1, (m.ngroups, -1)).mT for t in (B, C))
    return z, x, B, C, torch.log1p((dt + spread(m, "dt_bias", dt.shape)).exp())


def out_of(m, y, x, z):
    """Skip, norm and gate of y and x [B, h, L, P]."""
    y, x = y.transpose(1, 2), x.transpose(1, 2)
    y = y + spread(m, "D", (*x.mT.shape[:-1], m.nheads)).mT * x
    return m.out_proj(m.norm(y.flatten(2)) * z)


def mixer(m, u, H=H, W=W):
    """y_i = sum_j (C_i . B_j) dt_j exp(A_log) x_j + D x_i, head h with the B and C of group h % ngroups."""
    z, x, B, C, dt = projected(m, u, H, W)
    groups = torch.arange(m.nheads) % m.ngroups
    w = dt * spread(m, "A_log", dt.shape).exp()
    w = w if m.ssd_positve_dA else -w
    pairs = (C[:, groups] @ B[:, groups].mT) * w.mT[:, :, None, :]
    return out_of(m, pairs.to(x.dtype) @ x, x, z)


def recurrence(x, a, B, C, state):
    """y_i = C_i S_i, S_i = exp(a_i) S_{i-1} + B_i^T x_i: x [.., L, P], a [.., L], B and C [.., L, N]."""
    ys = []
    for i in range(a.shape[-1]):
        state = a[..., i, None, None].exp() * state + B[..., i, :, None] * x[..., i, None, :]
        ys.append((C[..., i, None, :] @ state).squeeze(-2))
    return torch.stack(ys, dim=-2)


def pair_matrix(x, a, B, C, state):
    """The same with the scores of all pairs, every decay summed up on its own."""
    L = a.shape[-1]
    later = torch.ones(L, L).tril().bool()  # [i, j]
    sums = (a[..., None].expand(*a.shape, L) * later.tril(-1)).cumsum(-2)
    y = (C @ B.mT * torch.where(later, sums.exp(), 0)) @ x
    return y + a.cumsum(-1).exp()[..., None] * (C @ state)


def causal_mixer(m, u, scan=recurrence, H=H, W=W):
    """Mamba2's scan: head h with the B and C of group h // (h / ngroups); bidirectional, half of them from the end."""
    z, x, B, C, dt = projected(m, u, H, W)
    dt = dt.clamp(*m.dt_limit)
    wide = torch.promote_types(u.dtype, torch.float32)
    a = (-spread(m, "A_log", dt.shape).exp() * dt).mT.to(wide)
    groups = torch.arange(m.nheads) // (m.nheads // m.ngroups)
    inputs = [(x * dt.mT[..., None]).to(wide), a, B[:, groups].to(wide), C[:, groups].to(wide)]
    state = torch.zeros(m.nheads, m.d_state, m.headdim, dtype=wide)
    if m.init_states is not None:
        state = spread(m, "init_states", (len(u), *m.init_states.shape)).mT.to(wide)
    if not m.bidirection:
        y = scan(*inputs, state)
    else:
        forth, back = zip(*(t.chunk(2, dim=1) for t in inputs), strict=True)
        y_back = scan(*(t.flip(2) for t in back), state[: m.nheads // 2]).flip(2)
        y = torch.cat([scan(*forth, state[: m.nheads // 2]), y_back], dim=1)
    return out_of(m, y.to(x.dtype), x, z)


def block(m, x):
    def position(conv, x):
        return x + conv(x.mT.reshape(len(x), -1, H, W)).flatten(2).mT

    x = position(m.cpe1, x)
    if isinstance(m.attn, NonCausalSSD):
        formula = mixer if m.attn.linear_attn_duality else causal_mixer
        x = x + formula(m.attn, m.norm1(x))
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


CAUSAL = {
    "one group": {},
    "two groups, short chunks": {"ngroups": 2, "chunk_size": 8},
    "a group per head, limits of dt": {"ngroups": -1, "dt_limit": (0.5, 1.5)},
    "initial states": {"learnable_init_states": True, "chunk_size": 16},
    "both directions": {"bidirection": True, "ngroups": 2, "chunk_size": 11},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", CAUSAL.values(), ids=CAUSAL.keys())
def test_causal_like_the_recurrence(kwargs, dtype):
    m = randomise(NonCausalSSD(**SIZES, linear_attn_duality=False, **kwargs)).to(dtype)
    also = [functools.partial(causal_mixer, scan=pair_matrix)]
    check(m, causal_mixer, tokens(3, H * W, 24, dtype=dtype), also=also, call=call)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 20, 64])
@pytest.mark.parametrize("strength", [0.1, 30.0], ids=["weak decay", "strong decay"])
def test_chunks_are_the_recurrence(strength, chunk_size):
    """In float64, with all gradients; strong decays underflow to 0 within a chunk."""
    g = torch.Generator().manual_seed(0)
    L, h, groups, P, N = 20, 6, 3, 4, 5
    shapes = ((2, L, h, P), (2, L, h), (2, L, groups, N), (2, L, groups, N), (h, N, P))
    x, a, B, C, state = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    inputs = [t.requires_grad_() for t in (x, -strength * a.square(), B, C, state)]

    def naive(x, a, B, C, state):
        B, C = (t.repeat_interleave(h // groups, dim=2).transpose(1, 2) for t in (B, C))
        return recurrence(x.transpose(1, 2), a.mT, B, C, state).transpose(1, 2)

    cotangent = torch.randn(2, L, h, P, generator=g, dtype=torch.float64)
    found = []
    for f in (lambda *t: ssd_scan(*t[:4], chunk_size, t[4]), naive):
        y = f(*inputs)
        found.append((y, *torch.autograd.grad(y, inputs, cotangent)))
    for got, expected in zip(*found, strict=True):
        assert (got - expected).abs().max() <= 64 * torch.finfo(torch.float64).eps * expected.abs().max()


def test_causal_autocast(monkeypatch):
    """The scan itself stays in float32: its products would be rounded."""
    dtypes = set()

    def spy(*args):
        y = ssd_scan(*args)
        dtypes.update([y.dtype, (y @ y.mT).dtype])
        return y

    monkeypatch.setattr("effvit.layers.vssd.ssd_scan", spy)
    m = randomise(NonCausalSSD(**SIZES, linear_attn_duality=False, chunk_size=8)).eval()
    also = [functools.partial(causal_mixer, scan=pair_matrix)]
    check(m, causal_mixer, tokens(2, H * W, 24), autocast=torch.bfloat16, call=call, also=also)
    assert dtypes == {torch.float32}


def test_the_causal_scan_sees_no_later_token():
    """But through the depthwise convolution: one row of the map ahead."""
    m = randomise(NonCausalSSD(**SIZES, linear_attn_duality=False)).eval()
    u = tokens(1, H * W, 24)
    v = u.clone()
    v[:, 3 * W :] += 1
    assert_bitwise_equal(call(m, u)[:, : 2 * W - 1], call(m, v)[:, : 2 * W - 1])
    assert not torch.equal(call(m, u)[:, 2 * W :], call(m, v)[:, 2 * W :])


def test_what_the_model_passes_down_does_nothing():
    x = tokens(2, H * W, 24)
    kwargs = {
        "attn_types": ["mamba2", "standard"], "simple_downsample": True, "simple_patch_embed": False, "lepe": True,
        "image_size": 224, "use_mem_eff_path": True, "bidirection": True, "dt_limit": (1, 2),
    }  # fmt: skip
    blocks = [randomise(VMAMBA2Block(24, (H, W), 4, d_state=10, **k)) for k in ({}, kwargs)]
    assert_bitwise_equal(blocks[1](x), blocks[0](x))
    m = randomise(NonCausalSSD(**SIZES))
    other = NonCausalSSD(**SIZES, attn_type="mamba2", chunk_size=3, learnable_init_states=True, **kwargs)
    other.load_state_dict(m.state_dict() | {"init_states": torch.ones(4, 12, 10)})
    assert_bitwise_equal(other(x, H, W, seq_idx=torch.arange(H * W)), m(x, H, W))


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (13, 9)], ids=str)
def test_map_sizes(size):
    m = randomise(NonCausalSSD(**SIZES, ngroups=2)).eval()
    x = tokens(2, size[0] * size[1], 24)
    check(m, lambda m, x: mixer(m, x, *size), x, call=lambda m, x: m(x, *size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"ssd_ngroups": 2}, {"attn_type": "standard"}, {"linear_attn_duality": False, "ssd_chunk_size": 8}],
    ids=["", "groups", "standard", "causal"],
)
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


BOTH = {"linear_attn_duality": False, "bidirection": True}


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"headdim": 7}, "headdim must be a divisor of expand"),
        ({"ngroups": 3}, "ngroups must be a divisor of the 4 heads, got 3"),
        ({"d_conv": 4}, "d_conv must be odd, got 4"),
        ({"activation": "gelu"}, "activation must be 'silu'"),
        ({"chunk_size": 0}, "chunk_size must be >= 1, got 0"),
        ({"headdim": 16, **BOTH}, "headdim must be such that heads are even with bidirection, got 16"),
        ({"ngroups": 1, **BOTH}, "ngroups must be even with bidirection, got 1"),
        ({"ngroups": 2, "learnable_init_states": True, **BOTH}, "learnable_init_states must be False with bidirection"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NonCausalSSD(**{**SIZES, **kwargs})
    with pytest.raises(ValueError, match="attn_type must be 'mamba2' or 'standard', got 'x'"):
        VMAMBA2Block(24, (H, W), 4, attn_type="x")


def test_packed_sequences_are_refused_by_the_causal_scan():
    m = NonCausalSSD(**SIZES, linear_attn_duality=False)
    with pytest.raises(ValueError, match="NonCausalSSD: seq_idx must be None with the causal scan"):
        m(tokens(1, H * W, 24), H, W, seq_idx=torch.zeros(1, H * W, dtype=torch.int32))


def test_drop_path_and_the_size_of_the_map():
    m = randomise(VMAMBA2Block(24, (H, W), 4, d_state=10, drop_path=1.0))
    x = tokens(2, H * W, 24)
    position = lambda conv, x: x + conv(x.mT.reshape(2, -1, H, W)).flatten(2).mT
    torch.testing.assert_close(m(x), position(m.cpe2, position(m.cpe1, x)))
    m.eval()
    assert_bitwise_equal(m(x, H, W), m(x))
    assert not torch.equal(m(x, W, H), m(x))
    assert VMAMBA2Block(24, 7, 4, bidirection=True).input_resolution == (7, 7)


CAUSAL_REST = {"linear_attn_duality": False, "learnable_init_states": True, "chunk_size": 8}


@pytest.mark.parametrize("kwargs", [{}, {"ngroups": 2}, CAUSAL_REST], ids=["1", "2", "causal"])
def test_the_rest(kwargs):
    make = lambda **factory: NonCausalSSD(**SIZES, **kwargs, **factory)
    check_everything_else(randomise(make()), make, tokens(2, H * W, 24), call)


def test_the_rest_of_the_block():
    make = lambda **factory: VMAMBA2Block(24, (H, W), 4, d_state=10, **factory)
    check_everything_else(randomise(make(), scale=0.2), make, tokens(2, H * W, 24))
