"""effvit.layers.InceptionDWConv2d against timm's class, and timm's models patched with it."""

import copy

import pytest
import timm.models.inception_next as timm_inception_next
import torch
from layer_suite import DTYPES, Record, check, check_everything_else, randomise, tokens

import effvit
from effvit._accuracy import assert_bitwise_equal, assert_close_to_truth
from effvit.layers import InceptionDWConv2d

SHAPE = (2, 16, 6, 9)
timms = timm_inception_next.InceptionDWConv2d.forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    {}, {"square_kernel_size": 5, "band_kernel_size": 7, "branch_ratio": 0.3}, {"dilation": 2},
], ids=str)  # fmt: skip
def test_like_timm(options, dtype):
    m, original = InceptionDWConv2d(16, **options), timm_inception_next.InceptionDWConv2d(16, **options)
    m.load_state_dict(randomise(original).state_dict(), strict=True)
    check(m.to(dtype), timms, tokens(*SHAPE, dtype=dtype), is_map=True)
    assert str(m.split_indexes) in repr(m) and m.split_indexes == original.split_indexes


def test_a_hook_on_a_convolution_is_called():
    m, seen = randomise(InceptionDWConv2d(16)), []
    m.dwconv_h.register_forward_hook(lambda *_: seen.append(1))
    check(m, timms, tokens(*SHAPE), is_map=True)
    assert seen


def test_autocast():
    check(randomise(InceptionDWConv2d(16)), timms, tokens(*SHAPE), is_map=True, autocast=torch.bfloat16)


def test_errors():
    for options, message in (
        ({"square_kernel_size": 4}, "square_kernel_size must be odd, got 4"),
        ({"band_kernel_size": 10}, "band_kernel_size must be odd, got 10"),
        ({"branch_ratio": 0.4}, "branch_ratio must be between 1 / 16 and 1 / 3 for in_chs 16, got 0.4"),
        ({"branch_ratio": 0.05}, "branch_ratio must be between"),
    ):
        with pytest.raises(ValueError, match=f"effvit::InceptionDWConv2d: {message}"):
            InceptionDWConv2d(16, **options)


def test_the_rest():
    make = lambda **factory: InceptionDWConv2d(16, **factory)
    check_everything_else(randomise(make()), make, tokens(*SHAPE))


# ---- timm's models -------------------------------------------------------------------------------------------------


def model(seed=0):
    torch.manual_seed(seed)
    return timm_inception_next.MetaNeXt(
        num_classes=10, depths=(1, 1, 2, 1), dims=(16, 24, 32, 40), ls_init_value=0.5
    ).eval()  # fmt: skip


def image(dtype=torch.float32):
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_patched():
    """Outputs and the gradient of every parameter; the way back is exact."""
    m = model()
    exact, before, other = copy.deepcopy(m).double(), copy.deepcopy(m), copy.deepcopy(m)
    report = effvit.patch(other, example=image(), verbose=False)
    assert len(report.replaced) == 6 and not report.not_replaced and all(r.ok for r in report)
    assert "taps 3x3, 1x11, 11x1" in str(report)
    with Record() as calls:
        y = other(image())
    assert calls.names.count("dwconv") == 15
    found = []
    for n in (other, before, exact):
        y = n(image(next(n.parameters()).dtype))
        y.square().sum().backward()
        found.append({"output": y.detach(), **{name: p.grad for name, p in n.named_parameters()}})
    largest = max(float(g.abs().max()) for name, g in found[2].items() if name != "output")
    for name, t in found[2].items():
        magnitude = None if name == "output" else torch.full_like(t, largest)
        assert_close_to_truth(found[0][name], t, found[1][name], magnitude=magnitude, name=name)
    assert len(effvit.unpatch(other, verbose=False)) == 5
    assert_bitwise_equal(other(image()), m(image()))


def test_not_patched():
    """A mixer that computes something else is left alone, with the reason."""
    m = model()
    m.stages[0].blocks[0].token_mixer.dwconv_w.register_forward_hook(lambda *_: None)
    m.stages[1].blocks[0].token_mixer.forward = lambda x: x
    report = effvit.patch(m, verbose=False)
    reasons = {r.detail for r in report.not_replaced}
    assert reasons == {
        "its dwconv_w is not a plain depthwise convolution", "its forward has been replaced on the instance",
    }  # fmt: skip
