"""effvit.layers.InceptionDWConv2d against timm's class, and in a model of timm."""

import copy

import pytest
import timm.models.inception_next as timm_inception_next
import torch
from layer_suite import DTYPES, Record, check, check_everything_else, randomise, tokens

from effvit._accuracy import assert_close_to_truth
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


def test_in_a_model_of_timm():
    """Outputs and the gradient of every parameter."""
    options = {"num_classes": 10, "depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40), "ls_init_value": 0.5}
    torch.manual_seed(0)
    before = timm_inception_next.MetaNeXt(**options).eval()
    m = timm_inception_next.MetaNeXt(**options, token_mixers=InceptionDWConv2d).eval()
    m.load_state_dict(before.state_dict(), strict=True)
    exact, found = copy.deepcopy(before).double(), []
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with Record() as calls:
        m(image)
    assert calls.names.count("dwconv") == 15
    for n in (m, before, exact):
        y = n(image.to(next(n.parameters()).dtype))
        y.square().sum().backward()
        found.append({"output": y.detach(), **{name: p.grad for name, p in n.named_parameters()}})
    largest = max(float(g.abs().max()) for name, g in found[2].items() if name != "output")
    for name, t in found[2].items():
        magnitude = None if name == "output" else torch.full_like(t, largest)
        assert_close_to_truth(found[0][name], t, found[1][name], magnitude=magnitude, name=name)
