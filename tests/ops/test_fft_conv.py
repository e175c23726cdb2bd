"""fft_conv: the shared suite; its definition against sums of taps; every length; spectra; the public functions."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import effvit
from effvit._accuracy import assert_bitwise_equal
from effvit.ops import fft_conv, fft_conv_spectrum
from effvit.ops._op import OPS
from effvit.reference.fft_conv import MODES, fft_conv_size
from effvit.testing import backends
from effvit.testing.fft_conv import SPEC
from op_suite import OpSuite


def _randn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class TestFftConv(OpSuite):
    spec = SPEC

    @pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
    @pytest.mark.parametrize("axes", [1, 2, 3])
    def test_public_function(self, axes, last):
        """The op on a map of three axes, absent ones circular; options by name, one for all axes or one each."""
        sizes, taps = (3, 4, 6)[-axes:], (2, 3, 4)[-axes:]
        shape = (2, *sizes, 3) if last else (2, 3, *sizes)
        u, pregate, postgate = (_randn(*shape, seed=i, dtype=torch.float32) for i in range(3))
        k, k_rev, d = _randn(3, *taps).float(), _randn(2, 3, *taps, seed=2).float(), _randn(3, seed=3).float()
        k = k.expand_as(k_rev)
        absent, ones = 3 - axes, (1,) * (3 - axes)
        wide = [t.view(2, *((1, *ones, *sizes, 3) if last else (3, *ones, *sizes, 1))) for t in (u, pregate, postgate)]
        taps = [t.reshape(2, 3, *ones, *t.shape[2:]) for t in (k, k_rev)]
        for mode, keep in (("same", None), (("circular", "causal", "same")[-axes:], (2, 9, 3)[-axes:])):
            modes = [mode] * axes if isinstance(mode, str) else mode
            options = {f"mode_{a}": 2 for a in "xyz"[:absent]}
            options |= {f"mode_{a}": MODES.index(m) for a, m in zip("xyz"[absent:], modes, strict=True)}
            options |= {f"keep_{a}": n for a, n in zip("xyz"[absent:], keep or [0] * axes, strict=True)}
            expected = SPEC.op()(
                wide[0], taps[0], d, *wide[1:], taps[1], None, act=1, kernel_scale=0.5, **options
            )  # fmt: skip
            found = fft_conv(
                u, k, d, pregate=pregate, postgate=postgate, k_rev=k_rev, mode=mode, channels_last=last, act="gelu",
                freq_keep=keep, kernel_scale=0.5,
            )  # fmt: skip
            assert_bitwise_equal(found, expected.view(shape))
        plain = fft_conv(u, k[0], mode="causal", channels_last=last)
        assert_bitwise_equal(fft_conv(u, k[0], channels_last=last), plain)


def _shifted(u, axis, lag, mode):
    """u[i - lag] along an axis, where mode says what is outside."""
    n = u.shape[axis]
    if mode == "circular":
        return u.roll(lag, axis)
    at = torch.arange(n) - lag
    inside = ((at >= 0) & (at < n)).view(-1, *[1] * (u.dim() - 1 - axis))
    return u.index_select(axis, at.clamp(0, n - 1)) * inside


def _by_taps(u, k, modes, k_rev=None):
    """The convolution of [B, C, *S] as a sum over taps."""
    y = torch.zeros_like(u)
    for taps, sign in ((k, 1), (k_rev, -1)):
        if taps is None:
            continue
        taps = taps if taps.dim() == u.dim() else taps[None]
        sizes = taps.shape[2:]
        for tap in itertools.product(*map(range, sizes)):
            moved = u
            for axis, (j, n, mode) in enumerate(zip(tap, sizes, modes, strict=True)):
                shift = (n - 1) // 2 if mode == "same" and sign > 0 else 0
                moved = _shifted(moved, 2 + axis, sign * j - shift, mode)
            y = y + taps[(..., *tap)].view(*taps.shape[:2], *[1] * len(sizes)) * moved
    return y


@pytest.mark.parametrize("sizes, taps, reverse, modes", [
    ((9,), (4,), None, ("causal",)), ((9,), (4,), None, ("same",)), ((9,), (5,), (12,), ("same",)),
    ((7,), (16,), (9,), ("circular",)), ((4,), (11,), None, ("same",)), ((5,), (5,), (3,), ("causal",)),
    ((4, 6), (3, 4), (2, 2), ("same", "causal")), ((5, 3), (7, 2), None, ("circular", "same")),
    ((3, 2, 4), (2, 2, 3), (1, 3, 2), ("causal", "circular", "same")),
])  # fmt: skip
@pytest.mark.parametrize("J", [1, 2])
def test_definition_is_a_sum_of_taps(sizes, taps, reverse, modes, J):
    """In float64, values and gradients, through the public function, in both layouts, and through spectra."""
    kernels = (3,) if J == 1 else (2, 3)
    u, k = _randn(2, 3, *sizes).requires_grad_(), _randn(*kernels, *taps, seed=2).requires_grad_()
    k_rev = None if reverse is None else _randn(*kernels, *reverse, seed=3).requires_grad_()
    leaves = [t for t in (u, k, k_rev) if t is not None]
    g = _randn(2, 3, *sizes, seed=4)
    expected = _by_taps(u, k, modes, k_rev)
    gradients = torch.autograd.grad((expected * g).sum(), leaves)
    spectrum = fft_conv_spectrum(k, sizes, k_rev=k_rev, mode=modes)
    last = fft_conv(u.movedim(1, -1).contiguous(), k, k_rev=k_rev, mode=modes, channels_last=True).movedim(-1, 1)
    for found in (fft_conv(u, k, k_rev=k_rev, mode=modes), fft_conv(u, spectrum=spectrum, mode=modes), last):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        found = torch.autograd.grad((found * g).sum(), leaves, retain_graph=True)
        torch.testing.assert_close(found, gradients, rtol=1e-12, atol=1e-13)


def test_conv1d_and_conv2d():
    """torch's cross-correlation with flipped kernels."""
    u, k = _randn(2, 3, 17), _randn(3, 5, seed=2)
    expected = F.conv1d(F.pad(u, (4, 0)), k.flip(-1).unsqueeze(1), groups=3)
    torch.testing.assert_close(fft_conv(u, k), expected, rtol=1e-12, atol=1e-13)
    u, k = _randn(2, 3, 6, 7), _randn(3, 3, 5, seed=2)
    expected = F.conv2d(u, k.flip(-1, -2).unsqueeze(1), padding=(1, 2), groups=3)
    torch.testing.assert_close(fft_conv(u, k, mode="same"), expected, rtol=1e-12, atol=1e-13)


# ---- accuracy --------------------------------------------------------------------------------------------------------

SHORT = list(range(1, 131))
LONG = [196, 197, 251, 256, 509, 1000, 1009, 1024, 2187, 4096, 10007, 16384, 65536, 100003]


def _relative_error(L, mode, by_spectrum):
    B, C = (2, 17) if L < 5000 else (1, 2)
    u, k = _randn(B, C, L), _randn(C, L, seed=2) / L**0.5
    if L <= 130:
        table = torch.arange(L)[:, None] - torch.arange(L)  # i - j
        y = torch.einsum("bcj,cij->bci", u, k[:, table % L] * ((table >= 0) | (mode == "circular")))
    else:
        y = fft_conv(u, k, mode=mode)  # float64
    u, k = u.float(), k.float()
    exact = y
    if by_spectrum:
        found = fft_conv(u, spectrum=fft_conv_spectrum(k, L, mode=mode), mode=mode)
    else:
        found = fft_conv(u, k, mode=mode)
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("mode", ["causal", "circular"])
@pytest.mark.parametrize("by_spectrum", [False, True], ids=["kernel", "spectrum"])
@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
def test_every_length(lengths, by_spectrum, mode):
    """5e-7 of the norm, where short ones go through taps and, given a spectrum, through transforms of every size.

    Inputs are rounded to float32, 6e-8 each; a transform adds that times the root of its levels.
    """
    errors = {L: _relative_error(L, mode, by_spectrum) for L in lengths}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 5e-7, f"length {worst}: {errors[worst]:.2e}"


@pytest.mark.parametrize("taps", [3, 65, 300, 700])
@pytest.mark.parametrize("mode", MODES)
def test_windows(taps, mode):
    """A long row in windows that overlap, or by taps, against a whole transform of float64; gradients too."""
    u, k = _randn(1, 5, 9001), _randn(5, taps, seed=2) / taps**0.5
    g = _randn(1, 5, 9001, seed=3)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [t.to(dtype).requires_grad_() for t in (u, k)]
        out = fft_conv(*leaves, mode=mode)
        results.append((out, *torch.autograd.grad(out, leaves, g.to(dtype))))
    for exact, found in zip(*results, strict=True):
        assert float((found.detach().double() - exact.detach()).norm() / exact.detach().norm()) <= 5e-7


# ---- layouts, spectra ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b for b in backends("fft_conv") if b.name.startswith("cpu:")], ids=str)
def test_layouts_agree(backend):
    """Channels first and last, and channels first by shape alone, give the same bits."""
    with backend.selected():
        for sizes, taps in (((70,), (9,)), ((300,), (300,)), ((9, 12), (9, 12))):
            u, gate = _randn(2, 21, *sizes).float(), _randn(2, 21, *sizes, seed=3).float()
            k, d = _randn(21, *taps, seed=2).float(), _randn(21, seed=4).float()
            options = {"act": "silu", "mode": "same"}
            first = fft_conv(u, k, d, pregate=gate, postgate=u, **options)
            inside, gate_inside = (t.movedim(1, -1).contiguous() for t in (u, gate))
            last = fft_conv(inside, k, d, pregate=gate_inside, postgate=inside, channels_last=True, **options)
            assert_bitwise_equal(last.movedim(-1, 1), first)
            moved = fft_conv(
                inside.movedim(-1, 1), k, d, pregate=gate_inside.movedim(-1, 1), postgate=u, **options
            )  # fmt: skip
            assert_bitwise_equal(moved, first)


@pytest.mark.parametrize("mode", MODES)
def test_spectrum(mode):
    """Its size, dtype and order are rfftn's; what it does not keep is zero; the scale is linear."""
    k = _randn(2, 3, 4, 5)
    s = fft_conv_spectrum(k, (6, 7), mode=mode, freq_keep=(2, 3), kernel_scale=0.5)
    full = fft_conv_spectrum(k, (6, 7), mode=mode)
    n = (6, 7) if mode == "circular" else (fft_conv_size(9), fft_conv_size(11))
    assert full.shape == (2, 3, n[0], n[1] // 2 + 1) and full.dtype == torch.complex128
    assert fft_conv_spectrum(k.bfloat16(), (6, 7), mode=mode).dtype == torch.complex64
    inside = [torch.minimum(torch.arange(m), m - torch.arange(m)) < keep for m, keep in zip(n, (2, 3), strict=True)]
    kept = inside[0][:, None] & inside[1][: n[1] // 2 + 1]
    torch.testing.assert_close(s, 0.5 * full * kept, rtol=1e-14, atol=1e-14)
    taps = torch.fft.irfft2(full, s=n)
    shift = (-1, -2) if mode == "same" else (0, 0)
    torch.testing.assert_close(taps, F.pad(k, (0, n[1] - 5, 0, n[0] - 4)).roll(shift, (-2, -1)), rtol=1e-12, atol=1e-13)
    u = _randn(2, 3, 6, 7)
    found = fft_conv(u, k, mode=mode, freq_keep=(2, 3), kernel_scale=0.5)
    torch.testing.assert_close(found, fft_conv(u, spectrum=s, mode=mode), rtol=1e-12, atol=1e-13)


def test_spectrum_of_both_directions():
    """Hyena's bidirectional kernel: conj(FFT(k_rev)) is added."""
    k, k_rev = _randn(3, 5), _randn(3, 7, seed=2)
    s = fft_conv_spectrum(k, 8, k_rev=k_rev)
    expected = torch.fft.rfft(k, 14) + torch.fft.rfft(k_rev, 14).conj()
    torch.testing.assert_close(s, expected, rtol=1e-12, atol=1e-13)


def test_sizes_of_transforms():
    assert [fft_conv_size(n) for n in (1, 2, 3, 11, 13, 22, 34, 127, 201, 2047)] == [
        2, 2, 4, 12, 14, 24, 36, 128, 210, 2048,
    ]  # fmt: skip


def test_second_derivatives():
    u, k = _randn(2, 1, 4).requires_grad_(), _randn(1, 3, seed=2).requires_grad_()
    gate, d = _randn(2, 1, 4, seed=3).requires_grad_(), _randn(1, seed=4).requires_grad_()

    def call(u, k, gate, d):
        return fft_conv(u, k, d, pregate=gate, postgate=gate, act="gelu")

    assert torch.autograd.gradgradcheck(call, (u, k, gate, d))
    s = torch.complex(_randn(1, 4), _randn(1, 4, seed=5)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda u, s: fft_conv(u, spectrum=s), (u, s))


def test_vmap_of_kernels_of_each_row():
    """Rows of the batch meet the kernels in turn, so that a mapped dim before the batch is no mistake."""
    u, k = _randn(3, 2, 4, 9).float(), _randn(2, 4, 5, seed=2).float()
    found = torch.func.vmap(lambda t: fft_conv(t, k))(u)
    assert_bitwise_equal(found, torch.stack([fft_conv(t, k) for t in u]))


def test_dtypes_under_autocast():
    u, k = _randn(2, 3, 9).float(), _randn(3, 9, seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = fft_conv(u, k)
    assert_bitwise_equal(found, fft_conv(u.bfloat16(), k))


# ---- bad calls of the public functions -----------------------------------------------------------------------------

_U, _K, _MAP = torch.zeros(2, 3, 8), torch.zeros(3, 4), torch.zeros(2, 3, 4, 5)
_S = torch.zeros(3, 6, dtype=torch.complex64)
BAD = {
    "u_rank": (ValueError, "u must be .*one to three axes, got", lambda: fft_conv(_U[0], _K)),
    "u_list": (TypeError, "u must be a torch.Tensor, got list", lambda: fft_conv([1.0], _K)),
    "u_integer": (TypeError, "u must be float32, bfloat16 or float16", lambda: fft_conv(_U.int(), _K)),
    "k_rank": (ValueError, "k must be .* of one axis, got", lambda: fft_conv(_U, _K[0])),
    "k_channels": (ValueError, "k must be .*got", lambda: fft_conv(_U, _K[:2])),
    "k_none": (ValueError, "k must be given where spectrum is not", lambda: fft_conv(_U)),
    "k_rev_rank": (ValueError, "k_rev must be .* of one axis", lambda: fft_conv(_U, _K, k_rev=_K[None, None])),
    "d_shape": (ValueError, "d must be .*got", lambda: fft_conv(_U, _K, _K)),
    "pregate": (ValueError, r"pregate must be \[2, 3, 8\] like u", lambda: fft_conv(_U, _K, pregate=_U[:1])),
    "postgate": (TypeError, "postgate must be", lambda: fft_conv(_U, _K, postgate=_U.half())),
    "spectrum_real": (TypeError, "spectrum must be torch.complex64", lambda: fft_conv(_U, spectrum=_S.real)),
    "spectrum_size": (ValueError, "spectrum must be of a transform as large", lambda: fft_conv(_U, spectrum=_S[:, :4])),
    "spectrum_and_k": (ValueError, "k must be None where spectrum", lambda: fft_conv(_U, _K, spectrum=_S)),
    "spectrum_rank": (ValueError, "spectrum must be .*N_half", lambda: fft_conv(_U, spectrum=_S[0])),
    "mode": (ValueError, "mode must be one of causal, same, circular", lambda: fft_conv(_U, _K, mode="valid")),
    "mode_type": (TypeError, "mode must be one of", lambda: fft_conv(_U, _K, mode=1)),
    "modes": (ValueError, "mode must be a mode, or one per axis", lambda: fft_conv(_U, _K, mode=("same", "same"))),
    "channels_last": (TypeError, "channels_last must be a bool", lambda: fft_conv(_U, _K, channels_last=1)),
    "act": (ValueError, "act must be one of none, gelu, silu", lambda: fft_conv(_U, _K, act="relu")),
    "freq_keep": (ValueError, "freq_keep must be between 1", lambda: fft_conv(_U, _K, freq_keep=0)),
    "freq_keep_type": (TypeError, "freq_keep must be an int", lambda: fft_conv(_U, _K, freq_keep=1.5)),
    "freq_keeps": (ValueError, "freq_keep must be an int, or one per", lambda: fft_conv(_U, _K, freq_keep=(1, 2))),
    "kernel_scale": (TypeError, "kernel_scale must be a real number", lambda: fft_conv(_U, _K, kernel_scale="x")),
    "double": (ValueError, "k must be given", lambda: fft_conv(_U.double())),
    # What only the op refuses is said in the dims of what was given, of one axis and of two.
    "words_k": (ValueError, r"k must be \[3, \*K\], or \[J, 3, \*K\] where J divides 2, like u \[2, 3, 8\], "
                r"got \[2, 4\]$", lambda: fft_conv(_U, _K[:2])),
    "words_k_batch": (ValueError, r"k must be \[3, \*K\], or \[J, 3, \*K\] where J divides 2, like u \[2, 8, 3\], "
                      r"got \[4, 3, 4\]$", lambda: fft_conv(_U.view(2, 8, 3), _K.expand(4, 3, 4), channels_last=True)),
    "words_k_map": (ValueError, r"k must be \[3, \*K\], or \[J, 3, \*K\] where J divides 2, like u "
                    r"\[2, 3, 4, 5\], got \[1, 4, 2, 2\]$", lambda: fft_conv(_MAP, torch.zeros(1, 4, 2, 2))),
    "words_taps": (ValueError, r"k must be of at least one tap per axis, got \[3, 0, 2\]$",
                   lambda: fft_conv(_MAP, torch.zeros(3, 0, 2))),
    "words_k_rev": (ValueError, r"k_rev must be of the batch and channels of k \[3, 4\], got \[2, 3, 4\]$",
                    lambda: fft_conv(_U, _K, k_rev=_K.expand(2, 3, 4))),
    "words_d": (ValueError, r"d must be \[C\] = \[3\], got \[4\]$",
                lambda: fft_conv(_MAP, torch.zeros(3, 2, 2), torch.zeros(4))),
    "words_stride": (ValueError, r"u must be a tensor whose last stride is 1, got strides \(24, 1, 8\)$",
                     lambda: fft_conv(_U.mT, _K, channels_last=True)),
    "words_spectrum": (ValueError, r"spectrum must be of a transform .*, \[4, 5\], got \[3, 4, 3\]$",
                       lambda: fft_conv(_MAP, spectrum=torch.zeros(3, 4, 3, dtype=torch.complex64))),
    "words_spectrum_channels": (ValueError, r"spectrum must be \[3, \*N_half\], or \[J, 3, \*N_half\] where J "
                                r"divides 2, like u \[2, 3, 8\], got \[2, 6\]$", lambda: fft_conv(_U, spectrum=_S[:2])),
    "words_spectrum_and_k": (ValueError, r"k must be None where spectrum is given, got \[3, 4\]$",
                             lambda: fft_conv(_U, _K, spectrum=_S)),
    "words_double": (ValueError, r"d must be \[C\] = \[3\], got \[3, 4\]$",
                     lambda: fft_conv(_U.double(), _K, _K)),
}  # fmt: skip
BAD_SPECTRUM = {
    "size_type": (TypeError, "size must be an int or integers", lambda: fft_conv_spectrum(_K, 1.5)),
    "size": (ValueError, "size must be one to three positive", lambda: fft_conv_spectrum(_K, (0,))),
    "sizes": (ValueError, "size must be one to three positive", lambda: fft_conv_spectrum(_K, (1, 2, 3, 4))),
    "k_rank": (ValueError, "k must be .* of 2 axes", lambda: fft_conv_spectrum(_K, (8, 8))),
    "k_dtype": (TypeError, "k must be float32", lambda: fft_conv_spectrum(_K.int(), 8)),
    "k_taps": (ValueError, "k must be", lambda: fft_conv_spectrum(_K[:, :0], 8)),
    "k_rev": (ValueError, "k_rev must be of the batch and channels", lambda: fft_conv_spectrum(_K, 8, k_rev=_K[:1])),
    "mode": (ValueError, "mode must be one of", lambda: fft_conv_spectrum(_K, 8, mode="full")),
    "kernel_scale": (ValueError, "kernel_scale must be finite", lambda: fft_conv_spectrum(_K, 8, kernel_scale=1e999)),
}  # fmt: skip


@pytest.mark.parametrize("name", [f"fft_conv-{n}" for n in BAD] + [f"fft_conv_spectrum-{n}" for n in BAD_SPECTRUM])
def test_bad_public_calls(name):
    op, case = name.split("-")
    error, message, call = (BAD if op == "fft_conv" else BAD_SPECTRUM)[case]
    with pytest.raises(error, match=f"effvit::{op}: {message}"):
        call()


def test_exported():
    assert effvit.ops.fft_conv_spectrum is fft_conv_spectrum and "fft_conv" in OPS


@pytest.mark.parametrize("name, change", [
    ("k", lambda t: torch.complex(t["k"], t["k"])), ("k", lambda t: t["k"].long()), ("d", lambda t: t["d"].int()),
    ("pregate", lambda t: t["pregate"].float()), ("k_rev", lambda t: t["k_rev"].bool()),
])  # fmt: skip
def test_float64_is_checked_like_other_dtypes(name, change):
    given = {"u": _randn(2, 3, 8), "k": _randn(3, 4), "k_rev": _randn(3, 2), "d": _randn(3), "pregate": _randn(2, 3, 8)}
    assert fft_conv(**given).is_contiguous() and fft_conv(**given).dtype == torch.float64
    with pytest.raises(TypeError, match=f"effvit::fft_conv: {name} must be"):
        fft_conv(**given | {name: change(given)})


def test_float64_of_nothing_has_gradients():
    u, k, d = _randn(0, 3, 8).requires_grad_(), _randn(3, 4).requires_grad_(), _randn(3).requires_grad_()
    found = torch.autograd.grad(fft_conv(u, k, d).sum(), (u, k, d))
    assert [t.shape for t in found] == [t.shape for t in (u, k, d)] and not found[1].any()


def test_spectrum_of_kernels_of_two_dtypes():
    k, k_rev = _randn(3, 4, dtype=torch.float32), _randn(3, 5, seed=2)
    assert torch.equal(fft_conv_spectrum(k, 8, k_rev=k_rev), fft_conv_spectrum(k.double(), 8, k_rev=k_rev))
