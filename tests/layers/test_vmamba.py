"""effvit.layers.SS2D and VSSBlock against VMamba's formulas with the four sequences and their scans in memory."""

import copy

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import SS2D, VSSBlock

H, W, C = 4, 5, 12
SIZES = {"d_model": C, "d_state": 3, "ssm_ratio": 1.5}  # 18 channels


def sequences(x):
    """[B, D, H, W] -> [B, 4, D, L]: rows, columns, and both from their end."""
    forth = torch.stack([x.flatten(2), x.mT.flatten(2)], 1)
    return torch.cat([forth, forth.flip(-1)], 1)


def merged(y, H, W):
    """[B, 4, D, L] -> [B, D, H, W]: every sequence back on the map, one after another."""
    maps = [y[:, 0].unflatten(-1, (H, W)), y[:, 1].unflatten(-1, (W, H)).mT]
    maps += [y[:, 2].flip(-1).unflatten(-1, (H, W)), y[:, 3].flip(-1).unflatten(-1, (W, H)).mT]
    return maps[0] + maps[1] + maps[2] + maps[3]


def scans(m, x, form="steps"):
    """x [B, D, H, W] -> [B, H, W, D], float32 or wider: the projections are those of the sequences. Token by token, or
    as a sum over the pairs of tokens."""
    wide = torch.promote_types(x.dtype, torch.float32)
    xs = sequences(x)
    B, D, L = len(x), x.shape[1], xs.shape[-1]
    x_dbl = torch.einsum("bkdl,kcd->bkcl", xs, m.x_proj_weight)
    dts, Bs, Cs = x_dbl.split([m.dt_rank, m.d_state, m.d_state], dim=2)
    dts = torch.einsum("bkrl,kdr->bkdl", dts, m.dt_projs_weight)
    xs, dts, Bs, Cs = (t.to(wide) for t in (xs, dts, Bs, Cs))
    bias = spread(m, "dt_projs_bias", (B, L, 4, D)).to(wide).permute(0, 2, 3, 1)
    delta = torch.log1p((dts + bias).exp())
    A = -spread(m, "A_logs", (B, L, 4 * D, m.d_state)).to(wide).exp().unflatten(2, (4, D))
    skip = spread(m, "Ds", (B, L, 4 * D)).to(wide).unflatten(2, (4, D)).permute(0, 2, 3, 1)
    h, ys = torch.zeros(B, 4, D, m.d_state, dtype=wide), []
    if form == "pairs":
        total = (delta.unsqueeze(-1) * A.permute(0, 2, 3, 1, 4)).cumsum(3)  # [B, 4, D, L, N]
        decay = (total[:, :, :, :, None] - total[:, :, :, None]).exp() * torch.ones(L, L).tril()[..., None]
        h = torch.einsum("bkdijn,bkdj,bknj->bkdin", decay, delta * xs, Bs)
        ys = torch.einsum("bkdin,bkni->bkdi", h, Cs).unbind(-1)
    for i in range(L if form == "steps" else 0):
        step = delta[..., i, None]
        h = torch.exp(step * A[:, i]) * h + step * Bs[:, :, None, :, i] * xs[..., i, None]
        ys.append((h * Cs[:, :, None, :, i]).sum(-1))
    y = torch.stack(ys, -1) + skip * xs
    return merged(y, *x.shape[2:]).permute(0, 2, 3, 1)


def mixer(m, x, form="steps"):
    if m.channel_first:
        x = x.permute(0, 2, 3, 1)
    silu = torch.nn.functional.silu
    x = m.in_proj(x)
    z = None
    if not m.disable_z:
        x, z = x[..., : m.d_inner], x[..., m.d_inner :]
        z = z if m.disable_z_act else silu(z)
    x = x.permute(0, 3, 1, 2).contiguous()
    x = silu(m.conv2d(x) if m.d_conv > 1 else x)
    y = scans(m, x, form)
    y = m.out_norm(y.to(m.in_proj.weight.dtype)).to(x.dtype)
    y = m.out_act(y)
    out = m.out_proj(y if z is None else y * z)
    return out.permute(0, 3, 1, 2) if m.channel_first else out


def block(m, x):
    if m.channel_first:
        x = x.permute(0, 2, 3, 1)
    x = x + (m.norm(mixer(m.op, x)) if m.post_norm else mixer(m.op, m.norm(x)))
    if m.mlp_branch:
        mlp = m.mlp

        def perceptron(x):
            if hasattr(mlp, "drop"):
                y, z = mlp.fc1(x).chunk(2, -1)
                return mlp.fc2(y * torch.nn.functional.gelu(z))
            return mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x)))

        x = x + (m.norm2(perceptron(x)) if m.post_norm else perceptron(m.norm2(x)))
    return x.permute(0, 3, 1, 2) if m.channel_first else x


VARIANTS = {
    "v2": {},
    "v0": {"forward_type": "v0", "d_state": 16, "ssm_ratio": 1.0},
    "v05_noz, one state": {"forward_type": "v05_noz", "d_state": 1},
    "v3nozact, wide steps": {"forward_type": "v3nozact", "dt_rank": 5, "bias": True, "conv_bias": False},
    "v04_oact_onnone, no convolution": {"forward_type": "v04_oact_onnone", "d_conv": 1},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, dtype):
    m = randomise(SS2D(**{**SIZES, **kwargs})).to(dtype)
    check(m, mixer, tokens(2, H, W, C, dtype=dtype), also=[lambda m, x: mixer(m, x, "pairs")])


def test_channels_first():
    m = randomise(SS2D(**SIZES, channel_first=True))
    x = tokens(2, C, H, W)
    check(m, mixer, x, is_map=True)
    last = SS2D(**SIZES)
    last.load_state_dict(m.state_dict())
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), m(x))


def test_autocast():
    m = randomise(SS2D(**SIZES)).eval()
    check(m, mixer, tokens(2, H, W, C), autocast=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"post_norm": True, "gmlp": True}, {"mlp_ratio": 0.0, "forward_type": "v05_noz", "ssm_d_state": 1}],
    ids=["", "post norm, gated", "no MLP"],
)
def test_block_like_the_formula(kwargs, dtype):
    m = randomise(VSSBlock(C, ssm_ratio=1.0, **{"ssm_d_state": 4, **kwargs}), scale=0.2).to(dtype)
    check(m, block, tokens(2, H, W, C, dtype=dtype))


def test_block_with_channels_first_and_checkpoint():
    kwargs = {"hidden_dim": C, "ssm_d_state": 4, "ssm_ratio": 1.0, "channel_first": True}
    m = randomise(VSSBlock(**kwargs), scale=0.2)
    x = tokens(2, C, H, W)
    check(m, block, x, is_map=True)
    again = VSSBlock(**kwargs, use_checkpoint=True)
    again.load_state_dict(m.state_dict())
    grads = []
    for module in (m, again):
        y = module(x)
        grads.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
    for a, b in zip(*grads, strict=True):
        assert_bitwise_equal(a, b)


def test_state_dict_of_the_original():
    shapes = {n: list(p.shape) for n, p in SS2D(96, dt_rank="auto").state_dict().items()}
    assert shapes == {
        "x_proj_weight": [4, 38, 192], "dt_projs_weight": [4, 192, 6], "dt_projs_bias": [4, 192],
        "A_logs": [768, 16], "Ds": [768], "in_proj.weight": [384, 96], "conv2d.weight": [192, 1, 3, 3],
        "conv2d.bias": [192], "out_norm.weight": [192], "out_norm.bias": [192], "out_proj.weight": [96, 192],
    }  # fmt: skip
    names = {n.split(".")[0] for n in VSSBlock(C).state_dict()}
    assert names == {"norm", "op", "norm2", "mlp"}


def test_initialisation():
    torch.manual_seed(0)
    m = SS2D(256, d_state=4, ssm_ratio=1.0, dt_min=0.01, dt_max=0.2)
    dt = torch.nn.functional.softplus(m.dt_projs_bias)
    assert 0.0099 < dt.min() < 0.0105 and 0.19 < dt.max() < 0.201
    torch.testing.assert_close(m.A_logs.exp(), torch.arange(1.0, 5.0).expand(1024, 4))
    assert (m.Ds == 1).all() and m.Ds._no_weight_decay and m.A_logs._no_weight_decay
    assert 0.24 < m.dt_projs_weight.abs().max() <= 16**-0.5 and 0.06 < m.x_proj_weight.abs().max() <= 1 / 16
    assert (SS2D(C, dt_init="constant", dt_rank=4).dt_projs_weight == 0.5).all()
    assert not SS2D(C, initialize="v2").A_logs.any() and 0.9 < SS2D(256, initialize="v1").A_logs.std() < 1.1
    torch.manual_seed(0)
    plain = SS2D(256, d_state=4, ssm_ratio=1.0, forward_type="v0", dt_min=0.05, initialize="v2", d_conv=5)
    assert plain.conv2d.kernel_size == (3, 3) and plain.A_logs.any()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"forward_type": "xv1a"}, "forward_type must be v0, .*got 'xv1a'"),
        ({"forward_type": "v31d"}, "forward_type must be v0, .*got 'v31d'"),
        ({"forward_type": "v2softmax"}, "forward_type must be v0, .*got 'v2softmax'"),
        ({"d_conv": 4}, "d_conv must be odd, or below 2 for none, got 4"),
        ({"d_state": 0}, "d_state must be >= 1, got 0"),
        ({"dt_init": "zeros"}, "dt_init must be 'random' or 'constant', got 'zeros'"),
        ({"initialize": "v3"}, "initialize must be 'v0', 'v1' or 'v2', got 'v3'"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=rf"effvit::SS2D: {message}"):
        SS2D(**{**SIZES, **kwargs})


def test_drop_path_and_branches():
    m = randomise(VSSBlock(C, drop_path=1.0, ssm_d_state=2))
    x = tokens(2, H, W, C)
    assert_bitwise_equal(m(x), x)
    m.eval()
    assert not torch.equal(m(x), x)
    m = VSSBlock(C, ssm_ratio=0.0)
    assert {n.split(".")[0] for n in m.state_dict()} == {"norm2", "mlp"}


def test_more_states_than_the_operator_takes():
    m = randomise(SS2D(4, d_state=300, ssm_ratio=0.5, dt_rank=1), scale=0.05)
    x = tokens(1, 2, 2, 4)
    torch.testing.assert_close(m(x), mixer(copy.deepcopy(m), x))


@pytest.mark.parametrize("kwargs", [{}, {"forward_type": "v05_noz", "d_state": 1}], ids=["v2", "v05_noz"])
def test_the_rest(kwargs):
    make = lambda **factory: SS2D(**{**SIZES, **kwargs}, **factory)
    check_everything_else(randomise(make()), make, tokens(2, H, W, C))


def test_the_rest_of_the_block():
    make = lambda **factory: VSSBlock(C, ssm_d_state=4, ssm_ratio=1.0, **factory)
    check_everything_else(randomise(make(), scale=0.2), make, tokens(2, H, W, C))
