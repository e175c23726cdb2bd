"""effvit.layers.RepLKBlock and ReparamLargeKernelConv against RepLKNet's formula, and merged against themselves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layer_suite import DTYPES, check, check_everything_else, check_merged, randomise, tokens
from torch import nn

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import ReparamLargeKernelConv, RepLKBlock

SHAPE = (2, 8, 6, 9)


def norm_of(part, x):
    return part.bn(part.conv(x))


def large(m, x):
    if hasattr(m, "lkb_reparam"):
        return m.lkb_reparam(x)
    y = norm_of(m.lkb_origin, x)
    return y + norm_of(m.small_conv, x) if m.small_kernel else y


def block(m, x):
    y = norm_of(m.pw1, m.prelkb_bn(x)).clamp(min=0)
    return x + norm_of(m.pw2, large(m.large_kernel, y).clamp(min=0))


def in_dtype(m, dtype):
    """In 16 bits what a ReLU cuts is far from what it keeps: near its edge a rounding decides, in any code."""
    if dtype != torch.float32:
        with torch.no_grad():
            for part in (m.pw1.bn, getattr(m.large_kernel, "lkb_origin", m.pw1).bn):
                part.bias.add_(6 * (-1.0) ** torch.arange(12))
    return m.to(dtype)


def make(**options):
    return RepLKBlock(8, 12, **{"block_lk_size": 13, "small_kernel": 5, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_like_the_formula(train, dtype):
    m = in_dtype(randomise(make()), dtype).train(train)
    check(m, block, tokens(*SHAPE, dtype=dtype), is_map=True)


@pytest.mark.parametrize("small", [None, 3])
def test_convolution_like_the_formula(small):
    m = randomise(ReparamLargeKernelConv(8, 8, 7, 1, 8, small)).eval()
    check(m, large, tokens(*SHAPE), is_map=True)


def test_other_strides_and_groups():
    for stride, groups in ((2, 8), (1, 2)):
        m = randomise(ReparamLargeKernelConv(8, 8, 7, stride, groups, 3)).eval()
        check(m, large, tokens(*SHAPE), is_map=True)
        check_merged(m, tokens(*SHAPE), yardsticks=[large])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"small_kernel": None}, {"block_lk_size": 31}], ids=str)
def test_merged(options, dtype):
    """The merged block computes the same, and is what small_kernel_merged constructs."""
    m, x = in_dtype(randomise(make(**options)), dtype), tokens(*SHAPE, dtype=dtype)
    merged = check_merged(m, x, yardsticks=[block])
    other = make(**options, small_kernel_merged=True).to(dtype).eval()
    other.load_state_dict(merged.state_dict(), strict=True)
    assert_bitwise_equal(other(x), merged(x))
    check(merged, block, x, is_map=True)  # its gradients
    other = make(**options, small_kernel_merged=True).to(dtype).eval()
    before = set(state := m.state_dict())
    other.load_state_dict(state, strict=True)  # that of the block as it was trained
    assert_bitwise_equal(other(x), merged(x))
    assert set(state) == before


def test_merged_weights_are_those_of_both_kernels():
    m = randomise(ReparamLargeKernelConv(8, 8, 7, 1, 8, 3)).double().eval()
    scales = [p.bn.weight / (p.bn.running_var + p.bn.eps).sqrt() for p in (m.lkb_origin, m.small_conv)]
    parts = [
        p.conv.weight.clone() * s.view(-1, 1, 1, 1) for p, s in zip((m.lkb_origin, m.small_conv), scales, strict=True)
    ]
    merged = copy.deepcopy(m)
    merged.merge_kernel()  # the original's name
    weight = parts[0].clone()
    weight[:, :, 2:5, 2:5] += parts[1]
    torch.testing.assert_close(merged.lkb_reparam.weight, weight)


def test_a_hook_inside_is_called():
    m, x = randomise(make()).eval(), tokens(*SHAPE)
    m.reparameterize()
    for part in (m.large_kernel, m.large_kernel.lkb_reparam, m.lk_nonlinear):
        seen = []
        handle = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        check(m, block, x, is_map=True)
        handle.remove()
        assert seen


def test_autocast():
    m = in_dtype(randomise(make()), torch.bfloat16).float().eval()
    check(m, block, tokens(*SHAPE), is_map=True, autocast=torch.bfloat16)


def test_parameter_names_are_the_originals():
    norm = lambda name: {
        f"{name}.{p}" for p in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    names = norm("prelkb_bn")
    for part in ("pw1", "pw2", "large_kernel.lkb_origin", "large_kernel.small_conv"):
        names |= norm(f"{part}.bn") | {f"{part}.conv.weight"}
    assert set(make().state_dict()) == names
    names = {name for name in names if "lkb_origin" not in name and "small_conv" not in name}
    names |= {"large_kernel.lkb_reparam.weight", "large_kernel.lkb_reparam.bias"}
    assert set(make(small_kernel_merged=True).state_dict()) == names


def test_errors():
    with pytest.raises(ValueError, match="effvit::ReparamLargeKernelConv: kernel_size must be odd, got 4"):
        make(block_lk_size=4)
    with pytest.raises(ValueError, match="small_kernel must be odd and at most 13, got 15"):
        make(small_kernel=15)
    m = make()
    m.large_kernel.small_conv.bn = nn.BatchNorm2d(12, track_running_stats=False)
    with pytest.raises(ValueError, match="every BatchNorm must have running statistics, got one without"):
        m.reparameterize()
    assert hasattr(m.large_kernel, "lkb_origin")


def test_a_trained_state_dict_that_does_not_fit():
    state = make().state_dict()
    del state["large_kernel.small_conv.bn.bias"]
    with pytest.raises(RuntimeError, match="Missing key.*small_conv.bn.bias"):
        make(small_kernel_merged=True).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for lkb_origin.conv.weight"):
        make(small_kernel_merged=True, block_lk_size=7).load_state_dict(make().state_dict())


def test_stochastic_depth_and_synchronised_norms():
    m, x = randomise(make(drop_path=0.5)), tokens(16, 8, 2, 3)
    assert not torch.equal(m(x), m(x))
    assert torch.equal(m.eval()(x), m(x))
    assert sum(isinstance(p, nn.SyncBatchNorm) for p in make(sync_bn=True).modules()) == 5


def test_the_rest():
    check_everything_else(randomise(make(), scale=0.15), lambda **factory: make(**factory), tokens(*SHAPE))
    merged = lambda **factory: make(small_kernel_merged=True, **factory)
    check_everything_else(randomise(merged(), scale=0.15), merged, tokens(*SHAPE))


def test_the_kernel_is_one_convolution():
    """Against sums of shifted maps, tap by tap."""
    m, x = randomise(make(small_kernel_merged=True)).double().large_kernel, tokens(1, 12, 5, 4).double()
    y, padded = m.lkb_reparam.bias.view(-1, 1, 1), F.pad(x, (6, 6, 6, 6))
    for i in range(13):
        for j in range(13):
            y = y + padded[:, :, i : i + 5, j : j + 4] * m.lkb_reparam.weight[:, :1, i, j, None]
    torch.testing.assert_close(m(x), y)


def test_merging_keeps_frozen_layers_frozen():
    for frozen in (True, False):
        m = RepLKBlock(8, 8, 7, 3).requires_grad_(not frozen)
        m.reparameterize()
        assert all(p.requires_grad != frozen for p in m.parameters())
    m = ReparamLargeKernelConv(8, 8, 7, 1, 8, 3).requires_grad_(False)
    m.small_conv.bn.requires_grad_()
    m.reparameterize()
    assert all(p.requires_grad for p in m.parameters())


def test_loading_a_trained_layer_draws_no_random_numbers():
    merged, state = RepLKBlock(8, 8, 7, 3, small_kernel_merged=True), RepLKBlock(8, 8, 7, 3).state_dict()
    before = torch.get_rng_state()
    merged.load_state_dict(state)
    assert_bitwise_equal(torch.get_rng_state(), before)
