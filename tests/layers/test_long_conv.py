"""effvit.layers.LongConv and FlashButterfly against their formulas: Toeplitz matrices, and dense learned transforms."""

import functools

import pytest
import torch
import torch.nn.functional as F
from fft_formulas import fourier, toeplitz, wide
from layer_suite import DTYPES, check, check_everything_else, randomise, spread, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import FlashButterfly, LongConv
from effvit.layers.long_conv import BlockFFT

L, DIM = 11, 6


def squashed(kernel, L):
    k = wide(kernel.kernel)
    n = kernel.window
    if n and kernel.smooth_freq:
        m = torch.arange(n).to(k.dtype) - n // 2
        spectrum = torch.fft.rfft(k)
        weight = torch.exp(-0.5 * m**2).to(spectrum.dtype).expand(k.shape[1], 1, n)
        k = torch.fft.irfft(F.conv1d(spectrum, weight, padding="same", groups=k.shape[1]), n=k.shape[-1])
    elif n:
        k = F.avg_pool1d(k, n, 1, n // 2)
    return torch.where(k.abs() > kernel.lam, k - kernel.lam * k.sign(), 0)[..., :L]


def output(m, y):
    if isinstance(m.output_linear, torch.nn.Identity):
        return y
    linear, after = m.output_linear
    a = linear(y)
    return a[..., :DIM] * a[..., DIM:].sigmoid() if isinstance(after, torch.nn.GLU) else after(a)


def plain(m, x, convolve=toeplitz):
    """x [B, L, C]; the taps of the second kernel start at lag -1."""
    k = squashed(m.kernel, x.shape[1])
    D = spread(m, "D", (*x.shape[:2], m.channels, DIM)).unbind(2)
    outs = []
    for c in range(m.channels):
        back = torch.cat((torch.zeros_like(k[0, :, :1]), k[m.channels + c]), -1) if m.bidirectional else None
        outs.append(convolve(x, k[c], D[c], back))
    return output(m, m.activation(torch.cat(outs, dim=-1)))


def dense(t, N):
    """The transform of N = m n tokens as a matrix: row q m + p, column a n + b."""
    if t.learn_dft_matrices:
        learned = torch.view_as_complex(wide(getattr(t, f"mat_{min(N, t.max_m)}")))
    dft = torch.fft.fft(torch.eye(min(N, t.max_m), dtype=torch.float64))
    if not t.learn_dft_matrices:
        learned = dft[None]
    matrix = learned + dft.to(learned.dtype) if t.learn_additive else learned
    if N <= t.max_m:
        return matrix
    m, n = t.max_m, N // t.max_m
    twiddle = torch.exp(-2j * torch.pi * torch.arange(n)[:, None].double() * torch.arange(m) / N)
    inner = dense(t, n)
    return torch.einsum("hqb,bp,hpa->hqpab", inner, twiddle.to(inner.dtype), matrix).reshape(-1, N, N)


def butterfly(m, x):
    length, k = x.shape[1], squashed(m.kernel, x.shape[1])
    N = 2 ** (length + k.shape[-1] - 1).bit_length()
    u = F.pad(wide(x).mT, (0, N - length))
    taps = torch.zeros(*k.shape[:2], N, dtype=k.dtype)
    taps[..., : k.shape[-1]] = k
    if m.bidirectional:
        forth, back = taps.chunk(2)
        taps = forth + back.flip(-1)
    transforms = [dense(t, N) for t in (m.block_fft_u, m.block_fft_k)]
    u_f, k_f = ((f @ t.to(f.dtype).unsqueeze(-1)).squeeze(-1) for f, t in zip(transforms, (u, taps), strict=True))
    y = torch.fft.ifft(u_f[:, None] * k_f).real[..., :length].movedim(-1, 1)  # [B, L, c, C]
    y = y + wide(x)[:, :, None] * wide(spread(m, "D", (*x.shape[:2], m.channels, DIM)))
    return output(m, m.activation(y.flatten(2).to(x.dtype)))


VARIANTS = {
    "plain": {},
    "two kernels a channel": {"channels": 2, "activation": "silu"},
    "both directions": {"bidirectional": True, "channels": 2},
    "fewer taps than tokens": {"l_max": 4, "bidirectional": True, "activation": "tanh", "postact": "gelu"},
    "more taps than tokens": {"l_max": 16, "postact": None},
    "smoothed": {"use_ma_smoothing": True, "ma_window_len": 3, "lam": 0.05},
    "smoothed spectrum": {"use_ma_smoothing": True, "smooth_freq": True, "ma_window_len": 5, "bidirectional": True},
}


def layer(cls=LongConv, **kwargs):
    return cls(DIM, **{"l_max": L, "transposed": False, "lam": 0.1, **kwargs})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_the_formula(kwargs, dtype):
    m = randomise(layer(**kwargs)).to(dtype)
    check(m, plain, tokens(2, L, DIM, dtype=dtype), also=[functools.partial(plain, convolve=fourier)])


BUTTERFLIES = {
    "one matrix for all": {},
    "three steps": {"block_fft_conv_args": {"max_m": 4}},
    "a matrix per channel, both directions": {
        "block_fft_conv_args": {"H": DIM, "max_m": 8}, "bidirectional": True, "channels": 2,
    },
    "added to DFTs": {"block_fft_conv_args": {"learn_additive": True}, "l_max": 7},
    "an FFT": {"block_fft_conv_args": {"learn_dft_matrices": False}},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", BUTTERFLIES.values(), ids=BUTTERFLIES.keys())
def test_butterfly_like_the_formula(kwargs, dtype):
    check(randomise(layer(FlashButterfly, **kwargs)).to(dtype), butterfly, tokens(2, L, DIM, dtype=dtype))


@pytest.mark.parametrize("cls, formula", [(LongConv, plain), (FlashButterfly, butterfly)])
def test_autocast(cls, formula):
    m = randomise(layer(cls, bidirectional=True))
    check(m, formula, tokens(2, L, DIM), autocast=torch.bfloat16)


@pytest.mark.parametrize("n", [1, 2, 13, 16, 32, 100, 300, 600])
def test_block_fft_starts_as_an_fft(n):
    x = tokens(3, 2, n).double()
    for t in (BlockFFT(H=2, dtype=torch.float64), BlockFFT(learn_dft_matrices=False), BlockFFT(max_m=2).double()):
        N = 2 ** max(n - 1, 0).bit_length()
        torch.testing.assert_close(t(x, n).detach(), torch.fft.fft(x, n=N), rtol=0, atol=2e-5 * n**0.5)


def test_butterfly_starts_as_a_convolution():
    m, butterflies = layer(bidirectional=True, lam=0.0), layer(FlashButterfly, bidirectional=True, lam=0.0)
    state = dict(randomise(m).state_dict())
    butterflies.load_state_dict(state | {k: v for k, v in butterflies.state_dict().items() if k.startswith("block")})
    torch.testing.assert_close(butterflies(tokens(2, L, DIM)), m(tokens(2, L, DIM)))


def test_transposed_is_the_same():
    for cls in (LongConv, FlashButterfly):
        m, x = randomise(layer(cls, channels=2)), tokens(2, L, DIM)
        other = layer(cls, channels=2, transposed=True)
        other.load_state_dict(m.state_dict())
        torch.testing.assert_close(other(x.mT), m(x).mT)


@pytest.mark.parametrize("l_max", [4, L])
def test_the_second_kernel_as_published(l_max):
    """Reversed behind the first one, in a transform of L + l_max tokens."""
    m = randomise(layer(l_max=l_max, bidirectional=True, activation="id", postact=None)).double()
    u = tokens(2, DIM, L).double()
    first, second = squashed(m.kernel, L)
    k = F.pad(first, (0, L)) + F.pad(second.flip(-1), (L, 0))
    y = torch.fft.irfft(torch.fft.rfft(u, n=L + l_max) * torch.fft.rfft(k, n=L + l_max), n=L + l_max)[..., :L]
    torch.testing.assert_close(m(u.mT).mT, y + u * m.D[0][:, None])


def test_lengths():
    m, x = randomise(layer(bidirectional=True)), tokens(2, L, DIM)
    shorter = x.clone()
    shorter[0, 4:] = 0
    assert_bitwise_equal(m(x, lengths=torch.tensor([4, L])), m(shorter))
    assert_bitwise_equal(m(x, lengths=L), m(x))
    assert not torch.equal(m(x, lengths=3), m(x))


def test_initial_kernels():
    torch.manual_seed(0)
    k = LongConv(64, l_max=256, weight_init="random").kernel.kernel
    assert 0.0019 < float(k.detach().std()) < 0.0021
    k = LongConv(64, l_max=256).kernel.kernel[0].detach()
    # channel i falls off by exp(-j/L (H/2)^(i/H)): slowly the first, fast the last
    assert 0.018 < float(k[:, 0].std()) < 0.025
    ratios = [float(k[i : i + 8, 128:].std() / k[i : i + 8, :16].std()) for i in (0, 56)]
    assert 0.3 < ratios[0] < 0.7 and ratios[1] < 0.01


def test_keys():
    """Those of the original's state_dict, and of its learned transforms, which are there under two names."""
    names = {"D", "kernel.kernel", "output_linear.0.weight", "output_linear.0.bias"}
    m = LongConv(DIM, L, channels=2, bidirectional=True)
    assert set(m.state_dict()) == names
    assert m.kernel.kernel.shape == (4, DIM, L) and m.output_linear[0].weight.shape == (2 * DIM, 2 * DIM)
    matrices = {f"block_fft_{t}.mat_{n}" for t in "uk" for n in (2, 4, 8, 16)}
    m = FlashButterfly(DIM, L)
    assert set(m.state_dict()) == names | matrices and m.block_fft_u.mat_8.shape == (1, 8, 8, 2)
    theirs = m.state_dict() | {f"block_fft_{t}.dft_matrices.{i}": m.block_fft_u.mat_2 for t in "uk" for i in range(4)}
    m.load_state_dict(theirs, strict=True)


def test_bad_arguments():
    for kwargs, message in (
        ({"l_max": 0}, "LongConv: l_max must be >= 1, got 0"),
        ({"channels": 0}, "LongConv: channels must be >= 1, got 0"),
        ({"activation": "softplus"}, "LongConv: activation must be one of .*, got 'softplus'"),
        ({"postact": "softplus"}, "LongConv: postact must be one of .*, got 'softplus'"),
        ({"weight_init": "zeros"}, "LongConvKernel: weight_init must be 'random' or 'double_exp', got 'zeros'"),
        ({"ma_window_len": 4}, "LongConvKernel: ma_window_len must be odd, got 4"),
        (
            {"block_fft_conv": True, "block_fft_conv_args": {"max_m": 12}},
            "BlockFFT: max_m must be a power of two from 2 on, got 12",
        ),
    ):
        with pytest.raises(ValueError, match=f"effvit::{message}"):
            layer(**kwargs)


def test_dropout_is_active_in_training_only():
    x = tokens(2, L, DIM)
    for kwargs in ({"dropout": 0.5}, {"dropout": 0.5, "tie_dropout": True}, {"kernel_dropout": 0.5}):
        m = randomise(layer(**kwargs))
        assert not torch.equal(m(x), m(x)), kwargs
        assert_bitwise_equal(m.eval()(x), randomise(layer()).eval()(x))
    m = LongConv(DIM, L, postact=None, dropout=0.5, tie_dropout=True, lam=0.0)
    zero = m(x.mT) == 0  # whole channels
    assert zero.any() and torch.equal(zero.all(-1), zero.any(-1))


@pytest.mark.parametrize("cls", [LongConv, FlashButterfly])
def test_the_rest(cls):
    make = lambda **factory: layer(cls, bidirectional=True, **factory)
    check_everything_else(randomise(make()), make, tokens(2, L, DIM))


@pytest.mark.parametrize("cls", [LongConv, FlashButterfly])
def test_no_tokens(cls):
    assert cls(DIM, 8, channels=2)(torch.zeros(2, DIM, 0)).shape == (2, DIM, 0)
    assert cls(DIM, 8, transposed=False)(torch.zeros(2, 0, DIM), lengths=0).shape == (2, 0, DIM)
