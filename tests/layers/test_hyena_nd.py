"""effvit.layers.HyenaND against its formula: four directions by reversed maps, convolutions by Toeplitz matrices."""

import functools

import pytest
import torch
from fft_formulas import fourier2d, shared, sine_mlp, toeplitz2d
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import HyenaND

H, W, DIM = 4, 5, 6
DIRECTIONS = ((), (1, 2), (2,), (1,))  # axes along which the recurrence runs backwards


def terms(n, name, shape):
    """A number per channel, expanded to `shape`: where it is learned all terms of its gradient are found."""
    p = getattr(n, name)
    if not isinstance(p, torch.nn.Parameter):
        return torch.as_tensor(p).expand(1, *shape)[0]
    return shared(n, name, (1, *shape)[-max(len(shape), 3) :]).view(shape)  # [1, 1, channels] there


def window(n, *t):
    """[.., channels] of exp(-t |deltas|) along one axis or two, the root of it, and the shift."""
    names = ("Xdeltas", "Ydeltas") if hasattr(n, "Xdeltas") else ("deltas", "deltas")
    shape = (*map(len, t), getattr(n, names[0]).shape[-1])
    decay = 1
    for axis, (u, name) in enumerate(zip(t, names, strict=False)):
        u = u.view(-1, *[1] * (len(t) - axis))
        decay = decay * torch.exp(-u * terms(n, name, shape).abs())
    return (decay.sqrt() if n.sqrt_decay else decay) + terms(n, "shift", shape).to(decay.dtype)


def taps(f, rows, columns):
    """[channels, rows, columns]"""
    z = spread(f.pos_emb, "z", f.pos_emb.z.shape)[0]
    t = f.pos_emb.t[0, :, 0]
    if f.hyena2d_filter:
        pairs = torch.stack([torch.cat([z[i], z[j]]) for i in range(rows) for j in range(columns)])
        h = sine_mlp(f.implicit_filter, pairs).view(rows, columns, -1)
        if f.modulation.mode != "no":
            if f.modulation.mode == "symettric":
                t = torch.arange(len(t)).to(t.dtype)
            h = h * window(f.modulation, t[:rows], t[:columns])
        return h.permute(2, 0, 1)
    axes = []
    for axis, n in (("X", rows), ("Y", columns)):
        h = sine_mlp(getattr(f, f"{axis}implicit_filter"), z[:n], f.Yimplicit_filter[1])
        modulation = getattr(f, f"{axis}modulation")
        if modulation.mode != "no":
            h = h * window(modulation, t[:n])
        axes.append(h)
    return torch.einsum("id,jd->dij", *axes)


def plain(m, x, convolve=toeplitz2d, last_first=False):
    w = m.in_proj(x)
    padded = torch.nn.functional.pad(w, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)  # [B, H, W, C, 3, 3]
    w = (padded * spread(m.short_filter, "weight", (*w.shape, 1, 3, 3)).squeeze(4)).sum((-2, -1))
    w = w + spread(m.short_filter, "bias", w.shape)
    *x, v0 = w.split(DIM, dim=-1)
    filters = m.order - 1
    rows, columns = (min(n, m.l_max) for n in w.shape[1:3])
    if m.direct_paramtrization:
        k = m.filter[:filters, :, :rows, :columns]
        bias = spread(m, "bias", (*w.shape[:3], m.order, DIM)).unbind(3)
    else:
        k = taps(m.filter_fn, rows, columns).unflatten(0, (filters, DIM))
        bias = spread(m.filter_fn, "bias", (*w.shape[:3], filters * DIM)).split(DIM, dim=-1)
    directions, outs = DIRECTIONS if m.directional_mode.startswith("4") else DIRECTIONS[:1], []
    for axes in reversed(directions) if last_first else directions:
        v = v0
        for i in range(filters):
            back = (1, 2) if m.directional_mode == "seq" and i == 0 else axes
            v = convolve((v * x[filters - i]).flip(back), k[i], bias[i].flip(back), m.kernel_scale).flip(back)
        outs.append(v * x[0])
    y = torch.stack(outs[::-1] if last_first else outs, dim=-1)
    if m.directional_mode == "4dir":
        return m.out_proj(m.linear_mix(y).squeeze(-1))
    return m.out_proj(m.linear_mix(y.flatten(-2)) if m.directional_mode == "4dirp" else y.squeeze(-1))


VARIANTS = {
    "outer product": {},
    "outer product, order 4, learned windows": {"order": 4, "window_mode": "learn", "sqrt_decay": True},
    "outer product without windows": {"window_mode": "no", "kernel_scale": 1.0},
    "joint filter": {"hyena2d_filter": True, "order": 3, "shift": 0.1},
    "joint filter, learned windows": {"hyena2d_filter": True, "window_mode": "learn"},
    "joint filter, one decay": {"hyena2d_filter": True, "window_mode": "symettric", "sqrt_decay": True},
    "joint filter without windows": {"hyena2d_filter": True, "window_mode": "no"},
    "direct": {"direct_paramtrization": True, "order": 3},
    "fewer taps than rows": {"l_max": 3},
    "sequence": {"directional_mode": "seq", "order": 3},
    "four directions": {"directional_mode": "4dir", "order": 3, "kernel_scale": 0.5},
    "four directions with channels": {"directional_mode": "4dirp", "hyena2d_filter": True},
}


def layer(**kwargs):
    return HyenaND(DIM, **{"l_max": 5, "filter_order": 8, **kwargs})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, dtype):
    m = randomise(layer(**kwargs)).to(dtype)
    check(m, plain, tokens(2, H, W, DIM, dtype=dtype), also=[functools.partial(plain, convolve=fourier2d)])


@pytest.mark.parametrize("kwargs", [{"order": 3}, {"directional_mode": "4dir"}, {"hyena2d_filter": True}], ids=str)
def test_autocast(kwargs):
    m = randomise(layer(**kwargs))
    also = [functools.partial(plain, convolve=c, last_first=b) for c in (toeplitz2d, fourier2d) for b in (False, True)]
    check(m, plain, tokens(2, H, W, DIM), also=also, autocast=torch.bfloat16)


def test_the_scale_is_the_authors():
    """Theirs: the filter's transform divided by 2 l_max, then the whole inverse, at maps of l_max x l_max."""
    m, x = randomise(layer(l_max=4)).double(), tokens(2, 4, 4, DIM).double()
    assert m.kernel_scale == 1 / 8
    u, k = tokens(2, DIM, 4, 4, seed=3).double(), m.filters(4, 4)[0]
    theirs = torch.fft.irfft2(torch.fft.rfft2(k, s=(8, 8)) / 8 * torch.fft.rfft2(u, s=(8, 8)), s=(8, 8))[..., :4, :4]
    ours = toeplitz2d(u.permute(0, 2, 3, 1), k, torch.zeros(DIM).double(), m.kernel_scale)
    torch.testing.assert_close(ours.permute(0, 3, 1, 2), theirs)
    torch.testing.assert_close(m(x), plain(m, x))


def test_tokens_of_a_square_map():
    m, x = randomise(layer()).eval(), tokens(2, 16, DIM)
    assert_bitwise_equal(m(x), m(x.view(2, 4, 4, DIM)).view(2, 16, DIM))
    with pytest.raises(ValueError, match=r"effvit::HyenaND: u must be .* with a square N, got \[2, 12, 6\]"):
        m(tokens(2, 12, DIM))


def test_what_a_pixel_sees():
    x = tokens(1, 5, 5, DIM)
    changed = x.clone()
    changed[:, 2, 2] *= -1
    for mode, all_of_it in (("standard", False), ("4dir", True), ("4dirp", True)):
        m = randomise(layer(directional_mode=mode, kernel_scale=1.0)).eval()
        differs = (m(changed) - m(x)).abs().amax(-1)[0] > 1e-6
        assert differs[1:, 1:].all(), mode  # the short filter reaches one pixel back
        assert differs[0].any() == all_of_it and differs[:, 0].any() == all_of_it, mode


def test_keys():
    both = lambda *names: {f"{n}.{p}" for n in names for p in ("weight", "bias")}
    names = both("in_proj", "out_proj", "short_filter")
    shared = {"filter_fn.bias", "filter_fn.pos_emb.z", "filter_fn.pos_emb.t"}

    def mlp(axis=""):
        layers = both(*(f"filter_fn.{axis}implicit_filter.{i}" for i in (0, 2, 4)))
        return layers | {f"filter_fn.{axis}implicit_filter.{i}" for i in ("1.freq", "3.freq", "5.freq", "6.weight")}

    product = mlp("X") | mlp("Y") | {"filter_fn.Xmodulation.deltas", "filter_fn.Ymodulation.deltas"}
    assert set(HyenaND(DIM, 5).state_dict()) == names | shared | product
    joint = mlp() | {"filter_fn.modulation.Xdeltas", "filter_fn.modulation.Ydeltas"}
    m = HyenaND(DIM, 5, hyena2d_filter=True, directional_mode="4dir")
    assert set(m.state_dict()) == names | shared | joint | both("linear_mix") and m.linear_mix.weight.shape == (1, 4)
    one = mlp() | {"filter_fn.modulation.deltas", "filter_fn.modulation.shift"}
    m = HyenaND(DIM, 5, hyena2d_filter=True, window_mode="symettric")
    assert set(m.state_dict()) == names | shared | one
    direct = HyenaND(DIM, 5, order=3, direct_paramtrization=True)
    assert set(direct.state_dict()) == names | {"filter", "bias"} and direct.filter.shape == (3, DIM, 5, 5)


def test_bad_arguments():
    for kwargs, message in (
        ({"order": 1}, "HyenaND: order must be >= 2, got 1"),
        ({"l_max": 0}, "HyenaND: l_max must be >= 1, got 0"),
        ({"directional_mode": "parallel"}, "HyenaND: directional_mode must be one of .*, got 'parallel'"),
        ({"window_mode": "hann"}, "HyenaFilter2d: window_mode must be one of .*, got 'hann'"),
        ({"window_mode": "symettric"}, "HyenaFilter2d: window_mode must be another for one axis, got symettric"),
        ({"emb_dim": 2}, "HyenaFilter2d: emb_dim must be odd and at least 3 .*, got 2"),
    ):
        with pytest.raises(ValueError, match=f"effvit::{message}"):
            layer(**kwargs)


def test_dropout_is_active_in_training_only():
    m, x = randomise(layer(dropout=0.5)), tokens(2, H, W, DIM)
    assert not torch.equal(m(x), m(x))
    assert_bitwise_equal(m.eval()(x), randomise(layer()).eval()(x))


@pytest.mark.parametrize("kwargs", [{"order": 3, "directional_mode": "4dir"}, {"hyena2d_filter": True}], ids=str)
def test_the_rest(kwargs):
    make = lambda **factory: layer(**kwargs, **factory)
    check_everything_else(randomise(make()), make, tokens(2, H, W, DIM))


@pytest.mark.parametrize("shape", [(2, 0, 3, DIM), (2, 3, 0, DIM), (2, 0, DIM)], ids=str)
def test_no_pixels(shape):
    assert HyenaND(DIM, 4, directional_mode="4dir")(torch.zeros(shape)).shape == shape
