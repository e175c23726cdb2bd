"""spectral_gate: the shared suite, the public function's shapes, and its definition against convolutions."""

import numpy as np
import pytest
import torch

import effvit.ops
from effvit.testing import assert_bitwise_equal, assert_close_to_truth, backends
from effvit.testing._oracle import oracle_of
from effvit.testing.spectral_gate import SPEC
from op_suite import OpSuite

FLOAT64_EPS = torch.finfo(torch.float64).eps


class TestSpectralGate(OpSuite):
    spec = SPEC


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the definition ------------------------------------------------------------------------------------------------


def written_out(x, weight):
    """Sums over all positions and all bins, in NumPy: x [H, W], weight complex [H, W//2 + 1]."""
    H, W = x.shape
    rows, columns = np.arange(H), np.arange(W)
    along_h = np.exp(-2j * np.pi * np.outer(rows, rows) / H)
    along_w = np.exp(-2j * np.pi * np.outer(columns[: W // 2 + 1], columns) / W)
    gated = along_h.conj() @ (along_h @ x @ along_w.T * weight) / H  # columns are still frequencies
    bins = np.where((columns[: W // 2 + 1] == 0) | (2 * columns[: W // 2 + 1] == W), 1, 2)
    gated[:, bins == 1] = gated[:, bins == 1].real  # what irfft2 takes of them
    return (gated @ (along_w.conj() * bins[:, None])).real / W


@pytest.mark.parametrize("H, W", [(1, 1), (1, 6), (5, 1), (2, 2), (3, 4), (6, 5), (7, 7), (12, 10)])
def test_definition_is_the_sums_written_out(H, W):
    x, weight = randn(1, 2, H, W, 3, dtype=torch.float64), randn(1, H, W // 2 + 1, 3, 2, seed=1, dtype=torch.float64)
    found = SPEC.reference(x, weight)
    gate = torch.view_as_complex(weight).numpy()
    for n in range(2):
        for c in range(3):
            expected = written_out(x[0, n, :, :, c].numpy(), gate[0, :, :, c])
            error = np.abs(found[0, n, :, :, c].numpy() - expected).max()
            assert error <= 64 * FLOAT64_EPS * np.abs(expected).max()


@pytest.mark.parametrize("backend", [b for b in backends("spectral_gate") if not b.slow], ids=lambda b: b.name)
@pytest.mark.parametrize("H, W", [(4, 6), (5, 7), (1, 9), (14, 14)])
def test_a_spectrum_of_one_convolves_with_a_shift(H, W, backend):
    """The spectrum of a delta at (y, x) rolls the map by (y, x), the gradient rolls back, and that of it correlates."""
    C, shift = 5, (H // 2, W - 1)
    delta = torch.zeros(H, W, C)
    delta[shift] = 1
    weight = torch.view_as_real(torch.fft.rfft2(delta, dim=(0, 1)))[None].contiguous()
    x, g = randn(1, 2, H, W, C), randn(1, 2, H, W, C, seed=1)
    out = backend.forward(x, weight)
    torch.testing.assert_close(out, x.roll(shift, (2, 3)))
    dx, _ = backend.backward(g, x, weight)
    torch.testing.assert_close(dx, g.roll((-shift[0], -shift[1]), (2, 3)))


@pytest.mark.parametrize("backend", [b for b in backends("spectral_gate") if not b.slow], ids=lambda b: b.name)
def test_parts_without_effect(backend):
    """Of bins 0 and W/2 only what the real part of the inverse over H keeps matters, and only that has a gradient."""
    x, weight, g = randn(1, 2, 3, 4, 5), randn(1, 3, 3, 5, 2, seed=1), randn(1, 2, 3, 4, 5, seed=2)
    other = weight.clone()
    for f in (0, 2):
        other[:, 0, f, :, 1] += 7  # of the real bins the imaginary part
        turned = randn(5, 2, seed=3)  # of a pair of bins (h, -h) what is not Hermitian: W[h] + z, W[-h] - conj(z)
        other[:, 1, f] += turned
        other[:, 2, f] += turned * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(backend.forward(x, other), backend.forward(x, weight))
    dweight = backend.backward(g, x, weight)[1]
    bound = 1e-5 * float(dweight.abs().max())
    for f in (0, 2):
        assert dweight[0, 0, f, :, 1].abs().max() < bound
        assert (dweight[0, 1, f, :, 0] - dweight[0, 2, f, :, 0]).abs().max() < bound
        assert (dweight[0, 1, f, :, 1] + dweight[0, 2, f, :, 1]).abs().max() < bound
    assert dweight[0, 1, 1, :, 1].abs().max() > 100 * bound


# ---- the public function -------------------------------------------------------------------------------------------


def peer(x, weight, norm):
    """torch.fft as it is, for one or two axes."""
    axes = tuple(range(1, x.dim() - 1))
    spectrum = torch.fft.rfftn(x, dim=axes, norm=norm) * weight
    return torch.fft.irfftn(spectrum, s=[x.shape[a] for a in axes], dim=axes, norm=norm)


@pytest.mark.parametrize("norm", ["ortho", "backward", "forward"])
@pytest.mark.parametrize("kind", ["real", "complex", "conjugate", "bfloat16"])
@pytest.mark.parametrize("each", [False, True], ids=["shared", "each"])
@pytest.mark.parametrize("size", [(4, 6), (5, 3), (8,), (7,), (1,)], ids=str)
def test_public_function_is_torch_fft(size, each, kind, norm):
    """Results and gradients, whatever form the weight has."""
    B, C = 3, 5
    x, g = randn(B, *size, C), randn(B, *size, C, seed=2)
    given = randn(*(B,) * each, *size[:-1], size[-1] // 2 + 1, C, 2, seed=1)
    if kind in ("complex", "conjugate"):
        given = torch.view_as_complex(given)
    elif kind == "bfloat16":
        given = given.bfloat16()
    runs = []
    for function, dtype in ((effvit.ops.spectral_gate, None), (peer, None), (peer, torch.float64)):
        a, w = x.detach().clone().to(dtype or x.dtype).requires_grad_(), given.detach().clone().requires_grad_()
        gate = w.conj() if kind == "conjugate" else w
        if function is peer:
            wide = gate if w.is_complex() else torch.view_as_complex(w.float())
            out = peer(a, wide.to(torch.complex128) if dtype else wide, norm)
        else:
            out = function(a, gate, norm=norm)
        assert out.shape == x.shape
        grads = torch.autograd.grad(out, (a, w), g.to(out.dtype))
        runs.append([torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (out.detach(), *grads)])
    assert [t.dtype for t in runs[0]] == [t.dtype for t in runs[1]]
    for name, got, plain, truth in zip(("out", "x", "weight"), *runs, strict=True):
        eps = max(torch.finfo(got.dtype).eps, torch.finfo(torch.float32).eps)
        assert_close_to_truth(
            got, truth.double(), plain, magnitude=truth.abs().max().double().expand(truth.shape), eps=eps, name=name
        )


def test_public_function_is_the_operator():
    x, weight = randn(3, 4, 6, 5), randn(3, 4, 4, 5, 2, seed=1)
    op = torch.ops.effvit.spectral_gate
    assert_bitwise_equal(effvit.ops.spectral_gate(x, weight[0]), op(x[None], weight[:1])[0])
    assert_bitwise_equal(effvit.ops.spectral_gate(x, weight), op(x[:, None], weight)[:, 0])


def test_one_axis_is_a_map_of_one_row():
    x, weight = randn(2, 9, 4), randn(5, 4, 2, seed=1)
    expected = effvit.ops.spectral_gate(x[:, None], weight[None])[:, 0]
    assert_bitwise_equal(effvit.ops.spectral_gate(x, weight), expected)


def test_double_backward_through_the_public_function():
    given = randn(2, 3, 4, 2), randn(3, 3, 2, 2, seed=1)
    runs = []
    for function, dtype in (
        (effvit.ops.spectral_gate, torch.float32), (peer, torch.float32), (peer, torch.float64)
    ):  # fmt: skip
        x, weight = (t.to(dtype).requires_grad_() for t in given)
        out = function(x, torch.view_as_complex(weight), norm="ortho")
        first = torch.autograd.grad(out.square().sum(), (x, weight), create_graph=True)
        runs.append(torch.autograd.grad(sum(t.square().sum() for t in first), (x, weight)))
    for name, got, plain, truth in zip(("x", "weight"), *runs, strict=True):
        assert_close_to_truth(got, truth, plain, magnitude=truth.abs().max().expand(truth.shape), name=name)


# ---- what stays apart ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b for b in backends("spectral_gate") if not b.slow], ids=lambda b: b.name)
def test_samples_and_channels_do_not_meet(backend):
    """A NaN stays with its sample and channel, and the others have the same bits with it and without."""
    x, weight = randn(1, 3, 4, 5, 35), randn(1, 4, 3, 35, 2, seed=1)
    clean = backend.forward(x, weight)
    x[0, 1, 2, 3, 17] = float("nan")
    out = backend.forward(x, weight)
    assert out[0, 1, :, :, 17].isnan().all()
    out[0, 1, :, :, 17] = clean[0, 1, :, :, 17]
    assert_bitwise_equal(out, clean)


def test_a_sample_has_the_same_bits_in_any_batch():
    x, weight = randn(1, 5, 6, 7, 20), randn(1, 6, 4, 20, 2, seed=1)
    whole = torch.ops.effvit.spectral_gate(x, weight)
    assert_bitwise_equal(whole[:, 3:4].contiguous(), torch.ops.effvit.spectral_gate(x[:, 3:4], weight))


@pytest.mark.parametrize("H, W", [(128, 130), (1, 4099), (300, 1)], ids=str)
def test_large_maps(H, W):
    """Spectra beyond the caches, long axes, a prime of four digits."""
    x, weight, g = randn(1, 2, H, W, 3), randn(1, H, W // 2 + 1, 3, 2, seed=1), randn(1, 2, H, W, 3, seed=2)
    oracle = oracle_of(SPEC, (x, weight), {}, (g,))
    out = torch.ops.effvit.spectral_gate(x, weight)
    oracle.check_outputs((out,))
    found = torch.ops.effvit.spectral_gate_backward(g, x, weight)
    oracle.check_gradients(dict(zip(("x", "weight"), found, strict=True)))
