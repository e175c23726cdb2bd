"""effvit.layers.ScatteringChannelMixing and ScatteringBlock against SVT's formula, the wavelets by convolutions."""

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, randomise, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import ScatteringBlock, ScatteringChannelMixing
from effvit.layers.svt import DTCWT

H, W, DIM, BLOCKS = 6, 8, 8, 2

# near_sym_b as it is published, in decimals (Kingsbury).
H0 = [-0.0017578125, 0, 0.022265625, -0.046875, -0.0482421875, 0.296875, 0.55546875]
H1 = [
    -7.062639508928571e-05, 0, 1.341901506696429e-03, -1.883370535714286e-03, -7.156808035714285e-03,
    2.385602678571428e-02, 5.564313616071428e-02, -5.168805803571428e-02, -2.997576032366072e-01, 5.594308035714286e-01,
]  # fmt: skip
G0 = [
    7.062639508928571e-05, 0, -1.341901506696429e-03, -1.883370535714286e-03, 7.156808035714285e-03,
    2.385602678571428e-02, -5.564313616071428e-02, -5.168805803571428e-02, 2.997576032366072e-01, 5.594308035714286e-01,
]  # fmt: skip
G1 = [-0.0017578125, 0, 0.022265625, 0.046875, -0.0482421875, -0.296875, 0.55546875]


def filtered(x, half, dim):
    """x with both ends mirrored, convolved along one dim: a sum of slices."""
    taps, n, reach = half + half[-2::-1], x.shape[dim], len(half) - 1
    period = torch.cat((torch.arange(n), torch.arange(n).flip(0)))
    x = x.index_select(dim, period[torch.arange(-reach, n + reach) % (2 * n)])
    return sum(t * x.narrow(dim, i, n) for i, t in enumerate(taps))


def complex_pair(y):
    """Quads of pixels a b / c d -> two complex numbers."""
    y = y / 2**0.5
    a, b, c, d = y[..., ::2, ::2], y[..., ::2, 1::2], y[..., 1::2, ::2], y[..., 1::2, 1::2]
    return (a - d, b + c), (a + d, b - c)


def real_band(first, second):
    (r, i), (s, j) = first, second
    y = r.new_zeros(*r.shape[:2], 2 * r.shape[2], 2 * r.shape[3])
    for (p, q), value in {(0, 0): r + s, (0, 1): i + j, (1, 0): i - j, (1, 1): s - r}.items():
        grid = torch.zeros(2, 2, dtype=y.dtype)
        grid[p, q] = 0.5**0.5
        y = y + torch.kron(value.contiguous(), grid)
    return y


def forward(x):
    """x [B, C, H, W] -> low, real and imaginary parts [B, C, 6, H/2, W/2]."""
    low, high = filtered(x, H0, 3), filtered(x, H1, 3)
    z15, z165 = complex_pair(filtered(low, H1, 2))
    z75, z105 = complex_pair(filtered(high, H0, 2))
    z45, z135 = complex_pair(filtered(high, H1, 2))
    re, im = (torch.stack([z[part] for z in (z15, z45, z75, z105, z135, z165)], 2) for part in (0, 1))
    return filtered(low, H0, 2), re, im


def backward(low, re, im):
    z = list(zip(re.unbind(2), im.unbind(2), strict=True))
    high = filtered(real_band(z[1], z[4]), G1, 2) + filtered(real_band(z[2], z[3]), G0, 2)
    low = filtered(real_band(z[0], z[5]), G1, 2) + filtered(low, G0, 2)
    return filtered(high, G1, 3) + filtered(low, G0, 3)


def mixing(m, x):
    wide = torch.promote_types(x.dtype, torch.float32)
    low, re, im = forward(x.mT.unflatten(2, (H, W)).to(wide))
    low = low * m.complex_weight_ll.to(wide)
    re, im = (t.movedim(1, -1).unflatten(-1, (BLOCKS, -1)) for t in (re, im))
    (a, b), (c, d) = m.complex_weight_lh_1.to(wide), m.complex_weight_lh_2.to(wide)
    (e, f), (g, h) = m.complex_weight_lh_b1.to(wide), m.complex_weight_lh_b2.to(wide)
    times = lambda z, w: torch.einsum("...bd,bdk->...bk", z, w)
    r, i = (times(re, a) - times(im, b) + e).clamp(min=0), (times(re, b) + times(im, a) + f).clamp(min=0)
    re, im = times(r, c) - times(i, d) + g, times(r, d) + times(i, c) + h
    y = backward(low, *(t.flatten(-2).movedim(-1, 1) for t in (re, im)))
    return y.flatten(2).mT.to(x.dtype)


def block(m, x):
    x = x + mixing(m.attn, m.norm1(x))
    y = m.mlp.fc1(m.norm2(x))
    y = m.mlp.dwconv.dwconv(y.mT.unflatten(2, (H, W))).flatten(2).mT
    return x + m.mlp.fc2(y * 0.5 * (1 + torch.erf(y * 0.5**0.5)))


def call(m, x):
    return m(x, H, W)


def make(**factory):
    return ScatteringChannelMixing(DIM, (H, W), BLOCKS, **factory)


def make_block(**factory):
    return ScatteringBlock(DIM, mlp_ratio=2.0, size=(H, W), num_blocks=BLOCKS, **factory)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_like_the_formula(dtype):
    check(randomise(make()).to(dtype), mixing, tokens(2, H * W, DIM, dtype=dtype), call=call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_like_the_formula(dtype):
    check(randomise(make_block()).to(dtype), block, tokens(2, H * W, DIM, dtype=dtype), call=call)


@pytest.mark.parametrize("size", [(2, 4), (6, 8), (14, 10), (56, 28)])
def test_wavelets(size):
    """Bands as by convolution with the published decimals, and perfect reconstruction."""
    x, wavelets = tokens(2, *size, 3).double(), DTCWT(size)
    low, re, im = wavelets(x)
    for found, expected in zip((low, re, im), forward(x.movedim(3, 1)), strict=True):
        torch.testing.assert_close(found, expected.movedim(1, -1), rtol=0, atol=1e-14 * float(x.abs().max()))
    assert re.shape == (2, 6, size[0] // 2, size[1] // 2, 3)
    bound = 64 * torch.finfo(torch.float64).eps * float(x.abs().max())
    torch.testing.assert_close(wavelets.inverse(low, re, im), x, rtol=0, atol=bound)
    assert low.shape == x.shape and wavelets(x.float())[0].dtype == torch.float32


def test_orientations_are_apart():
    """A wave across a diagonal is in the band of that diagonal, its mirror image in the other one."""
    i = torch.arange(32.0)
    wave = torch.cos(2.0 * (i[:, None] + i))[None, :, :, None]
    energy = lambda x: sum(t.square().sum((0, 2, 3, 4)) for t in DTCWT(32)(x)[1:])
    one, other = energy(wave), energy(wave.flip(2))
    assert {int(one.argmax()), int(other.argmax())} == {1, 4}
    assert float(one.max()) > 5 * float(one[5 - int(one.argmax())])


def test_filters_survive_a_cast():
    m = make().bfloat16().double()
    torch.testing.assert_close(m.xfm.inverse(*m.xfm(x := tokens(1, H, W, 2).double())), x, rtol=0, atol=1e-13)


def test_state_dict_is_the_originals():
    m = randomise(make_block())
    parts = {name: t.clone() for name, t in m.state_dict().items()}
    lh = {f"attn.complex_weight_lh_{n}" for n in ("1", "2", "b1", "b2")}
    linear = {
        f"{n}.{p}" for n in ("norm1", "norm2", "mlp.fc1", "mlp.fc2", "mlp.dwconv.dwconv") for p in ("weight", "bias")
    }
    assert set(parts) == lh | linear | {"attn.complex_weight_ll"}
    assert parts["attn.complex_weight_lh_1"].shape == (2, BLOCKS, DIM // BLOCKS, DIM // BLOCKS)
    wavelets = {f"attn.xfm.{n}": torch.zeros(1, 1, 13, 1) for n in ("h0o", "h1o", "h0a")}
    wavelets |= {f"attn.ifm.{n}": torch.zeros(1, 1, 13, 1) for n in ("g0o", "g1b")}
    other = make_block()
    other.load_state_dict(parts | wavelets, strict=True)
    x = tokens(2, H * W, DIM)
    assert_bitwise_equal(call(other, x), call(m, x))
    assert ScatteringChannelMixing(64).complex_weight_ll.shape == (64, 56, 56)


def test_errors():
    with pytest.raises(
        ValueError, match="effvit::ScatteringChannelMixing: dim must be a multiple of num_blocks 4, got 6"
    ):
        ScatteringChannelMixing(6, 4)
    with pytest.raises(ValueError, match="size must be given for dim 32, got None"):
        ScatteringChannelMixing(32)
    with pytest.raises(ValueError, match=r"effvit::DTCWT: size must be two even numbers, got \(6, 7\)"):
        DTCWT((6, 7))
    expected = r"x must be \[B, 48, 8\] of a map 6 x 8, got \[2, 48, 8\], 8 x 6"
    with pytest.raises(ValueError, match=f"effvit::ScatteringChannelMixing: {expected}"):
        make()(tokens(2, 48, DIM), W, H)


def test_stochastic_depth_hooks_and_autocast():
    m, x, seen = randomise(make_block(drop_path=0.5)), tokens(8, H * W, DIM), []
    assert not torch.equal(call(m, x), call(m, x))
    m.eval().mlp.dwconv.register_forward_hook(lambda *_: seen.append(1))
    check(m, block, x, call=call)
    assert seen
    check(randomise(make_block()), block, x, call=call, autocast=torch.bfloat16)


@pytest.mark.parametrize("make", [make, make_block], ids=["mixing", "block"])
def test_the_rest(make):
    check_everything_else(randomise(make()), make, tokens(2, H * W, DIM), call)
