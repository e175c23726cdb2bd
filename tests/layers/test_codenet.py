"""effvit.layers.DeformConvSquareDepthWise against linear interpolation with dense weights of all pixels."""

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, randomise, tokens

from effvit._accuracy import assert_close_to_truth
from effvit.layers import DeformConvSquareDepthWise

SHAPE = (2, 6, 7, 5)


def plain(m, x):
    """Every tap is a sum over the whole map, of pixels weighted by max(0, 1 - distance) on either axis."""
    x = m.point_wise(x)
    spread = m.conv_offset(x).clamp(0, m.offset_bound)[:, 0] + m.dilation
    rows, columns = (torch.arange(n, dtype=x.dtype) for n in x.shape[2:])
    y = 0
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            at_y, at_x = rows[:, None] + i * spread, columns + j * spread
            near_y = (1 - (at_y[..., None] - rows).abs()).clamp(min=0)
            near_x = (1 - (at_x[..., None] - columns).abs()).clamp(min=0)
            sampled = torch.einsum("bhwm,bhwn,bcmn->bchw", near_y, near_x, x)
            y = y + m.weight[:, :, i + 1, j + 1, None] * sampled
    return y


def make(**options):
    return DeformConvSquareDepthWise(6, 8, **{"offset_bound": 3, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"offset_bound": 0.6}, {"dilation": 2, "padding": 2}, {"offset_bound": 40}],
                         ids=str)  # fmt: skip
def test_like_the_formula(options, dtype):
    m = randomise(make(**options))
    with torch.no_grad():
        m.conv_offset.weight.mul_(3)
        m.conv_offset.bias.fill_(0.9)
    check(m.to(dtype), plain, tokens(*SHAPE, dtype=dtype), is_map=True)


def test_offsets_matter_and_are_bounded():
    m, x = randomise(make()), tokens(*SHAPE)
    spread = m.conv_offset(m.point_wise(x))
    assert (spread < 0).any() and ((spread > 0) & (spread < 3)).any()
    with torch.no_grad():
        m.conv_offset.weight.zero_()
        m.conv_offset.bias.fill_(3.0)
        at_bound = m(x)
        m.conv_offset.bias.fill_(100.0)
        assert torch.equal(m(x), at_bound)


def test_without_offsets_it_is_a_convolution():
    m, x = make().double(), tokens(*SHAPE).double()
    y = torch.nn.functional.conv2d(m.point_wise(x), m.weight, padding=1, groups=8)
    torch.testing.assert_close(m(x), y)
    with torch.no_grad():
        m.conv_offset.bias.fill_(2.0)  # whole numbers: a dilated one
    y = torch.nn.functional.conv2d(m.point_wise(x), m.weight, padding=3, dilation=3, groups=8)
    torch.testing.assert_close(m(x), y)


def test_gradcheck_of_the_offsets():
    m = randomise(make(), scale=0.3).double()
    x = tokens(1, 6, 3, 4).double().requires_grad_()
    with torch.no_grad():
        m.conv_offset.bias.fill_(0.75)
    torch.autograd.gradcheck(lambda x, bias: torch.func.functional_call(m, {"conv_offset.bias": bias}, (x,)),
                             (x, m.conv_offset.bias))  # fmt: skip


def test_nan_stays_nan():
    x = tokens(*SHAPE)
    x[0, 0, 0, 0] = torch.nan
    y = randomise(make())(x)
    assert y[0, :, 0, 0].isnan().all() and torch.isfinite(y[1]).all()


def test_state_dict_is_the_originals():
    m = make()
    shapes = {name: tuple(t.shape) for name, t in m.state_dict().items()}
    assert shapes == {
        "weight": (8, 1, 3, 3), "conv_offset.weight": (1, 8, 1, 1), "conv_offset.bias": (1,),
        "point_wise.weight": (8, 6, 1, 1), "offset_template": (1, 18, 1, 1),
    }  # fmt: skip
    assert m.offset_template.flatten()[:6].tolist() == [-1, -1, -1, 0, -1, 1]


def test_errors():
    for options, message in (
        ({"stride": 2}, "stride must be 1, got 2"),
        ({"padding": 0}, "padding must be 1, got 0"),
        ({"kernel_size": 5}, "kernel_size must be 3, got 5"),
        ({"deformable_groups": 2}, "deformable_groups must be 1, got 2"),
        ({"bias": True}, "bias must be False, got True"),
        ({"offset_bound": -1}, "offset_bound must be a finite number from 0 on, got -1"),
    ):
        with pytest.raises(ValueError, match=f"effvit::DeformConvSquareDepthWise: {message}"):
            make(**options)


def test_autocast():
    m, x = randomise(make()), tokens(*SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = m(x), plain(m, x)
    exact = plain(m.double(), x.double())
    magnitude = exact.abs().amax(1, keepdim=True).expand_as(exact)
    assert_close_to_truth(y, exact, expected, magnitude=magnitude, eps=torch.finfo(torch.bfloat16).eps)


def test_the_rest():
    make_it = lambda **factory: make(**factory)
    check_everything_else(randomise(make_it(), scale=0.3), make_it, tokens(*SHAPE))
