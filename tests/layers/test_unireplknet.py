"""effvit.layers.UniRepLKNetBlock and DilatedReparamBlock against UniRepLKNet's formula, and merged with themselves."""

import pytest
import torch
import torch.nn.functional as F
from layer_suite import DTYPES, check, check_everything_else, check_merged, randomise, tokens
from torch import nn

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import DilatedReparamBlock, UniRepLKNetBlock
from effvit.layers.unireplknet import BRANCHES

SHAPE = (2, 8, 5, 7)


def dilated(m, x):
    if not hasattr(m, "origin_bn"):
        return m.lk_origin(x)
    y = m.origin_bn(m.lk_origin(x))
    for k, r in zip(m.kernel_sizes, m.dilates, strict=True):
        y = y + getattr(m, f"dil_bn_k{k}_{r}")(getattr(m, f"dil_conv_k{k}_{r}")(x))
    return y


def block(m, x):
    y = dilated(m.dwconv, x) if isinstance(m.dwconv, DilatedReparamBlock) else m.dwconv(x)
    y = m.norm(y)
    pooled = m.se.up(m.se.down(y.flatten(2).mean(-1)[:, :, None, None]).clamp(min=0))
    y = y / (1 + (-pooled).exp())
    y = m.pwconv1[1](y.movedim(1, 3))
    y = y * 0.5 * (1 + torch.erf(y * 0.5**0.5))
    norm = y.square().sum((1, 2), keepdim=True).sqrt()
    grn = m.act[1]
    y = y + y * grn.gamma * (norm / (norm.sum(-1, keepdim=True) / norm.shape[-1] + 1e-6))
    y = m.pwconv2[0](y + grn.beta if grn.use_bias else y).movedim(3, 1)
    y = m.pwconv2[2](y) if len(m.pwconv2) > 2 else y
    return x + (y if m.gamma is None else m.gamma[:, None, None] * y)


def make(kernel_size=7, **options):
    return UniRepLKNetBlock(8, kernel_size, **{"layer_scale_init_value": 0.3, "ffn_factor": 2, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kernel_size", [0, 3, 7])
def test_like_the_formula(kernel_size, train, dtype):
    m = randomise(make(kernel_size)).to(dtype).train(train)
    check(m, block, tokens(*SHAPE, dtype=dtype), is_map=True)


@pytest.mark.parametrize("kernel_size", BRANCHES)
def test_merged_branches(kernel_size):
    """Every size of kernel, and against sums of shifted maps."""
    m, x = randomise(DilatedReparamBlock(8, kernel_size)).eval(), tokens(*SHAPE)
    check(m, dilated, x, is_map=True)
    merged = check_merged(m, x, yardsticks=[dilated])
    other = DilatedReparamBlock(8, kernel_size, deploy=True).eval()
    other.load_state_dict(m.state_dict(), strict=True)
    assert_bitwise_equal(other(x), merged(x))
    half = kernel_size // 2
    padded = F.pad(x.double(), (half, half, half, half))
    y = merged.lk_origin.bias.double().view(-1, 1, 1)
    for i in range(kernel_size):
        for j in range(kernel_size):
            y = y + padded[:, :, i : i + 5, j : j + 7] * merged.lk_origin.weight.double()[:, :1, i, j, None]
    torch.testing.assert_close(merged.double()(x.double()), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    {"kernel_size": 0}, {"kernel_size": 5}, {"kernel_size": 13}, {"layer_scale_init_value": None},
], ids=str)  # fmt: skip
def test_merged(options, dtype):
    """The merged block computes the same, and is what deploy=True constructs."""
    m, x = randomise(make(**options)).to(dtype), tokens(*SHAPE, dtype=dtype)
    merged = check_merged(m, x, yardsticks=[block])
    other = make(**options, deploy=True).to(dtype).eval()
    other.load_state_dict(merged.state_dict(), strict=True)
    assert_bitwise_equal(other(x), merged(x))
    check(merged, block, x, is_map=True)
    other = make(**options, deploy=True).to(dtype).eval()
    other.load_state_dict(m.state_dict(), strict=True)  # that of the block as it was trained
    assert_bitwise_equal(other(x), merged(x))


def test_checkpointing_changes_nothing():
    m, x = randomise(make()), tokens(*SHAPE).requires_grad_()
    other = make(with_cp=True)
    other.load_state_dict(m.state_dict())
    for a, b in zip(*(torch.autograd.grad(n(x).square().sum(), (x, n.gamma)) for n in (m, other)), strict=True):
        assert_bitwise_equal(a, b)


def test_autocast():
    check(randomise(make()).eval(), block, tokens(*SHAPE), is_map=True, autocast=torch.bfloat16)


def test_parameter_names_are_the_originals():
    both = lambda *names: {f"{name}.{p}" for name in names for p in ("weight", "bias")}
    norm = lambda *names: (
        both(*names) | {f"{name}.{p}" for name in names for p in ("running_mean", "running_var", "num_batches_tracked")}
    )
    common = both("se.down", "se.up", "pwconv1.1") | {"act.1.gamma", "pwconv2.0.weight"}
    names = common | {"act.1.beta", "gamma", "dwconv.lk_origin.weight"} | norm("norm", "dwconv.origin_bn", "pwconv2.2")
    for branch in ("k5_1", "k3_2", "k3_3"):
        names |= {f"dwconv.dil_conv_{branch}.weight"} | norm(f"dwconv.dil_bn_{branch}")
    assert set(make().state_dict()) == names
    assert set(make(deploy=True).state_dict()) == common | both("dwconv.lk_origin") | {"pwconv2.0.bias"}


def test_errors():
    with pytest.raises(ValueError, match=r"effvit::UniRepLKNetBlock: kernel_size must be one of \[0, 3, 5, 7, .*got 4"):
        make(4)
    with pytest.raises(ValueError, match=r"effvit::DilatedReparamBlock: kernel_size must be one of \[5, 7, .*got 3"):
        DilatedReparamBlock(8, 3)
    m = make()
    m.norm = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(ValueError, match="every BatchNorm must have running statistics, got one without"):
        m.reparameterize()


def test_stochastic_depth_and_synchronised_norms():
    m, x = randomise(make(drop_path=0.5)), tokens(16, 8, 2, 3)
    assert not torch.equal(m(x), m(x))
    assert torch.equal(m.eval()(x), m(x))
    assert sum(isinstance(p, nn.SyncBatchNorm) for p in make(use_sync_bn=True).modules()) == 6


@pytest.mark.parametrize("make", [
    lambda **factory: make(**factory), lambda **factory: make(deploy=True, **factory),
    lambda **factory: DilatedReparamBlock(8, 9, **factory),
], ids=["block", "merged", "branches"])  # fmt: skip
def test_the_rest(make):
    check_everything_else(randomise(make(), scale=0.2), make, tokens(*SHAPE))


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_merging_keeps_frozen_layers_frozen(kernel_size):
    for frozen in (True, False):
        m = UniRepLKNetBlock(8, kernel_size).requires_grad_(not frozen)
        m.reparameterize()
        assert all(p.requires_grad != frozen for p in m.parameters())
