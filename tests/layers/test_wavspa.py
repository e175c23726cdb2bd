"""effvit.layers.WavSpA against its formula: transforms as dense matrices, one for every channel."""

import functools
import math

import numpy as np
import pytest
import torch
from fft_formulas import wide
from layer_suite import DTYPES, check, check_everything_else, randomise, tokens
from torch import nn

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import SanaLinearAttention, WavSpA
from effvit.layers.wavspa import daubechies

L, DIM = 11, 6


def rotations(thetas):
    """h [K, C] of the angles [K / 2, C]: products of matrices of pairwise rotations and cyclic shifts."""
    K = 2 * len(thetas)
    shift = torch.eye(K, dtype=thetas.dtype).roll(1, 1)
    columns = []
    for angles in thetas.unbind(1):
        h = torch.eye(K, dtype=thetas.dtype)[0]
        for a in angles:
            pair = torch.stack((torch.stack((a.sin(), a.cos())), torch.stack((a.cos(), -a.sin()))))
            h = h @ torch.block_diag(*[pair] * (K // 2)) @ shift
        columns.append(h @ torch.linalg.inv(shift))
    return torch.stack(columns, dim=1)


def low_pass(m):
    if m.wavelet == "ortho":
        return rotations(wide(m.thetas))
    return wide(m.adawave if m.learned else m.filter).expand(-1, DIM)


def analysis(h, N):
    """[C, N, N]: N / 2 rows of the low-pass, then as many of the high-pass."""
    K = len(h)
    g = h.flip(0) * torch.tensor([-((-1.0) ** j) for j in range(K)]).to(h.dtype)[:, None]
    n, j = torch.arange(N // 2)[:, None], torch.arange(K)
    places = nn.functional.one_hot((2 * n + K // 2 - j) % N, N).to(h.dtype)  # [N / 2, K, N]
    return torch.cat([torch.einsum("njm,jc->cnm", places, f) for f in (h, g)], dim=1)


def softmax(m, x):
    q, k, v = m.qkv(x).unflatten(-1, (3, m.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return m.proj(((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))


def by_transforms(h, N):
    """The same steps by torch.fft: functions that halve [B, N, C] to low and high, and back."""
    K = len(h)
    g = h.flip(0) * torch.tensor([-((-1.0) ** j) for j in range(K)]).to(h.dtype)[:, None]
    places = (torch.arange(K) - K // 2) % N
    spectra = [torch.fft.fft(torch.zeros(N, DIM, dtype=h.dtype).index_add(0, places, f), dim=0) for f in (h, g)]

    def halve(x):
        return torch.cat([torch.fft.ifft(torch.fft.fft(x, dim=1) * s, dim=1).real[:, ::2] for s in spectra], dim=1)

    def double(y):
        spread = torch.stack((y, torch.zeros_like(y)), dim=2).flatten(1, 2).chunk(2, dim=1)
        parts = zip(spread, spectra, strict=True)
        return sum(torch.fft.ifft(torch.fft.fft(t, dim=1) * s.conj(), dim=1).real for t, s in parts)

    return halve, double


def by_matrices(h, N):
    W = analysis(h, N)
    return lambda x: torch.einsum("cnm,bmc->bnc", W, x), lambda y: torch.einsum("cnm,bnc->bmc", W, y)


def plain(m, x, attend=softmax, step=by_matrices):
    N = -(-x.shape[1] // 2**m.level) * 2**m.level
    low = nn.functional.pad(wide(x), (0, 0, 0, N - x.shape[1]))
    h, steps, high = low_pass(m), [], []
    for level in range(m.level):
        halve, double = step(h, N >> level)
        low, detail = halve(low).chunk(2, dim=1)
        steps.append(double)
        high.append(detail)
    parts = [attend(a, p.to(x.dtype)) for a, p in zip(m.attentions, [low, *reversed(high)], strict=True)]
    low = wide(parts[0])
    for detail, double in zip(parts[1:], reversed(steps), strict=True):
        low = double(torch.cat((low, wide(detail)), dim=1))
    return low[:, : x.shape[1]].to(x.dtype)


VARIANTS = {
    "haar": {"wavelet": "haar", "level": 3},
    "db2": {},
    "db3, one level": {"wavelet": "db3", "level": 1},
    "db4, longer than the tokens": {"wavelet": "db4", "level": 3},
    "learned": {"wavelet": "db2", "learned": True},
    "learned haar": {"wavelet": "haar", "learned": True},
    "angles": {"wavelet": "ortho", "wlen": 6},
    "angles, two taps": {"wavelet": "ortho", "wlen": 2},
}


def layer(**kwargs):
    return WavSpA(DIM, **{"num_heads": 2, **kwargs})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, dtype):
    also = [functools.partial(plain, step=by_transforms)]
    check(randomise(layer(**kwargs)).to(dtype), plain, tokens(2, L, DIM, dtype=dtype), also=also)


def test_autocast():
    check(randomise(layer(learned=True)), plain, tokens(2, L, DIM), autocast=torch.bfloat16)


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_transforms_stay_in_float32_under_autocast(kwargs):
    m, x = layer(**kwargs), tokens(2, L, DIM)
    expected = m.decompose(x)
    back = m.reconstruct(expected, L)
    with torch.autocast("cpu", torch.bfloat16):
        for found, part in zip(m.decompose(x), expected, strict=True):
            assert_bitwise_equal(found, part)
        assert_bitwise_equal(m.reconstruct(expected, L), back)


@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("L", [1, 2, 5, 16, 23])
def test_the_inverse_is_exact(L, kwargs):
    """Of orthonormal wavelets, random angles among them; energy is kept."""
    m, x = layer(**kwargs, dtype=torch.float64).double(), tokens(2, L, DIM).double()
    parts = m.decompose(x)
    N = -(-L // 2**m.level) * 2**m.level
    assert [p.shape[1] for p in parts] == [N >> m.level, *(N >> i for i in range(m.level, 0, -1))]
    torch.testing.assert_close(m.reconstruct(parts, L), x, rtol=0, atol=1e-11)
    torch.testing.assert_close(sum(p.square().sum() for p in parts), x.square().sum(), rtol=1e-11, atol=0)


def test_haar_is_sums_and_differences():
    x = tokens(1, 8, DIM).double()
    low, high = layer(wavelet="haar", level=1, dtype=torch.float64).decompose(x)
    torch.testing.assert_close(low, (x[:, 0::2] + x[:, 1::2]) * 0.5**0.5)
    torch.testing.assert_close(high, (x[:, 0::2] - x[:, 1::2]) * 0.5**0.5)


def test_daubechies():
    """Closed forms, orthonormal shifts, and as many vanishing moments as there are pairs of taps."""
    r3 = math.sqrt(3)
    db2 = np.array([1 - r3, 3 - r3, 3 + r3, 1 + r3]) / (4 * math.sqrt(2))
    np.testing.assert_allclose(daubechies(4).numpy(), db2, rtol=0, atol=1e-14)
    r10, r = math.sqrt(10), math.sqrt(5 + 2 * math.sqrt(10))
    db3 = np.array([
        1 + r10 - r, 5 + r10 - 3 * r, 10 - 2 * r10 - 2 * r, 10 - 2 * r10 + 2 * r, 5 + r10 + 3 * r, 1 + r10 + r,
    ]) / (16 * math.sqrt(2))  # fmt: skip
    np.testing.assert_allclose(daubechies(6).numpy(), db3, rtol=0, atol=1e-14)
    for n in range(1, 21):
        h = daubechies(2 * n).numpy()
        correlation = np.correlate(h, h, "full")[2 * n - 1 :: 2]
        np.testing.assert_allclose(correlation, np.eye(n)[0], atol=1e-11)  # roots of a polynomial of degree n - 1
        g = h[::-1] * (-1.0) ** np.arange(2 * n)
        place = np.arange(2 * n) / n - 1
        for power in range(min(n, 8)):
            assert abs((g * place**power).sum()) < 1e-8, (n, power)
        assert abs((g * place**n).sum()) > 1e-8 or n > 6


def test_attention_of_another_kind():
    m = layer(attention=lambda dim: SanaLinearAttention(dim, heads=2, dim_head=3), num_heads=5)
    assert len(m.attentions) == 3 and all(type(a) is SanaLinearAttention for a in m.attentions)
    check(randomise(m), functools.partial(plain, attend=lambda a, x: a(x)), tokens(2, L, DIM))


def test_keys():
    attentions = {f"attentions.{i}.{n}.weight" for i in range(3) for n in ("qkv", "proj")}
    assert set(layer().state_dict()) == attentions
    m = layer(learned=True, wavelet="db3")
    assert set(m.state_dict()) == attentions | {"adawave"} and m.adawave.shape == (6, DIM)
    m = layer(wavelet="ortho", wlen=8)
    assert set(m.state_dict()) == attentions | {"thetas"} and m.thetas.shape == (4, DIM)


def test_bad_arguments():
    for kwargs, message in (
        ({"num_heads": 4}, "dim must be a multiple of num_heads 4, got 6"),
        ({"level": 0}, "level must be >= 1, got 0"),
        ({"wavelet": "db21"}, "wavelet must be 'haar', 'db1' .. 'db20' or 'ortho', got 'db21'"),
        ({"wavelet": "ortho", "wlen": 5}, "wlen must be even, got 5"),
    ):
        with pytest.raises(ValueError, match=f"effvit::WavSpA: {message}"):
            layer(**kwargs)


@pytest.mark.parametrize("kwargs", [{"learned": True}, {"wavelet": "ortho"}], ids=str)
def test_the_rest(kwargs):
    make = lambda **factory: layer(**kwargs, **factory)
    check_everything_else(randomise(make()), make, tokens(2, L, DIM))
