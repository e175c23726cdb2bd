"""selective_scan2d: the shared suite, its definition against scans written out, and the order of the directions."""

import pytest
import torch

import effvit.ops
from effvit.testing import assert_bitwise_equal, assert_close_to_truth, backends, small_tiles
from effvit.testing.selective_scan2d import SPEC
from op_suite import OpSuite, threads


class TestSelectiveScan2d(OpSuite):
    spec = SPEC


def route(s, H, W):
    """The places of the map in the order of direction s."""
    rows, columns = range(H), range(W)
    places = [(y, x) for x in columns for y in rows] if s % 2 else [(y, x) for y in rows for x in columns]
    return places[::-1] if s >= 2 else places


def written_out(x, dt, b, c, a, d=None, dt_bias=None, softplus=True, directions=range(4)):
    """Token after token along every direction."""
    B, H, W, D = x.shape
    out = [[torch.zeros(B, D, dtype=x.dtype) for _ in range(W)] for _ in range(H)]
    for s in directions:
        h = torch.zeros(B, D, a.shape[-1], dtype=x.dtype)
        for i, j in route(s, H, W):
            delta = dt[:, i, j, s] if dt_bias is None else dt[:, i, j, s] + dt_bias[s]
            delta = torch.log1p(delta.exp()) if softplus else delta
            h = torch.exp(delta[..., None] * a[s]) * h + delta[..., None] * b[:, i, j, s, None] * x[:, i, j, :, None]
            y = torch.einsum("bdn,bn->bd", h, c[:, i, j, s])
            out[i][j] = out[i][j] + (y if d is None else y + d[s] * x[:, i, j])
    return torch.stack([torch.stack(row, 1) for row in out], 1)


def doubles(name):
    args, kwargs = SPEC.sample(name).build()
    return [None if t is None else t.double().requires_grad_() for t in args], kwargs


@pytest.mark.parametrize("name", ["small", "small_plain", "one_column", "channels_first"])
def test_definition_is_the_scan_written_out(name):
    args, kwargs = doubles(name)
    leaves = [t for t in args if t is not None]
    found, expected = SPEC.reference(*args, **kwargs), written_out(*args, **kwargs)
    g = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for got, want in zip(
        (found, *torch.autograd.grad(found, leaves, g)),
        (expected, *torch.autograd.grad(expected, leaves, g)),
        strict=True,
    ):
        assert (got - want).abs().max() <= 64 * torch.finfo(torch.float64).eps * want.abs().max()


@pytest.mark.parametrize("backend", [b for b in backends("selective_scan2d") if not b.slow], ids=lambda b: b.name)
@pytest.mark.parametrize("s", range(4))
def test_directions(s, backend):
    """A token enters what its direction meets after it, and nothing else: b of the other directions is 0."""
    H, W, D, N = 3, 4, 5, 2
    generator = torch.Generator().manual_seed(s)
    x, dt, b, c = (torch.rand(1, H, W, *n, generator=generator) + 0.5 for n in ((D,), (4, D), (4, N), (4, N)))
    b *= (torch.arange(4) == s)[:, None]
    a = -0.2 * torch.rand(4, D, N, generator=generator)
    before = backend.forward(x, dt, b, c, a)
    x[:, 1, 2] += 1
    changed = (backend.forward(x, dt, b, c, a) != before).any(-1)[0]
    places = route(s, H, W)
    after = places[places.index((1, 2)) :]
    assert {(int(i), int(j)) for i, j in changed.nonzero()} == set(after)


def test_a_transposed_or_turned_map_exchanges_the_directions():
    """Bit for bit but for the order in which the directions are added."""
    (x, dt, b, c, a, d, bias), _ = SPEC.sample("small").build()
    out = effvit.ops.selective_scan2d(x, dt, b, c, a, d, bias)
    for turn, order in ((lambda t: t.transpose(1, 2), [1, 0, 3, 2]), (lambda t: t.flip(1, 2), [2, 3, 0, 1])):
        moved = [turn(x), *(turn(t)[..., order, :] for t in (dt, b, c))]
        turned = effvit.ops.selective_scan2d(*moved, *(t[order] for t in (a, d, bias)))
        torch.testing.assert_close(turn(turned), out)


@pytest.mark.parametrize("name", ["small_blocks", "vmamba_14x14_n16"])
def test_slabs_in_any_number_of_threads(name):
    """In the smallest tiles a direction of a small batch goes in slabs, blocks of channels on threads of their own."""
    args, kwargs = SPEC.sample(name).build()
    grad = torch.ones_like(args[0])
    for backend in (b for b in backends("selective_scan2d") if b.name.startswith("cpu:")):
        with small_tiles():
            with threads(1):
                one = backend.backward(grad, *args, **kwargs)
            for n in (2, 3):
                with threads(n):
                    many = backend.backward(grad, *args, **kwargs)
                for a, b in zip(many, one, strict=True):
                    assert_bitwise_equal(a, b, name=f"{backend.name} with {n} threads")


@pytest.mark.parametrize("backend", backends("selective_scan2d"), ids=lambda b: b.name)
def test_a_nan_stays_with_its_channel_and_comes_after_it(backend):
    args, _ = SPEC.sample("small").build(device=backend.device)
    clean = backend.forward(*args)
    x = args[0].clone()
    x[1, 1, 1, 2] = float("nan")
    out = backend.forward(x, *args[1:])
    assert out[1, 1, 1, 2].isnan()
    touched = out.isnan()
    touched[1, ..., 2] = False
    assert not touched.any()
    assert_bitwise_equal(out[0], clean[0])


@pytest.mark.parametrize("backend", [b for b in backends(SPEC.name) if b.name != "reference"], ids=lambda b: b.name)
def test_growing_states_are_cut_not_garbage(backend):
    """delta * a above 87 counts as 87; the definition overflows there."""
    sizes = (1e-9, (1, 1, 2, 3)), (500.0, (1, 1, 2, 4, 3)), (1.0, (1, 1, 2, 4, 1)), (1.0, (4, 3, 1))
    x, dt, b, a = (torch.full(shape, value, device=backend.device) for value, shape in sizes)
    out = backend.forward(x, dt, b, b, a)
    assert out.isfinite().all() and (out > 1e30).all()


def test_many_tokens_against_float64():
    """A map of many chunks, at weak and strong decays side by side."""
    generator = torch.Generator().manual_seed(0)
    H, W, D, N = 31, 67, 3, 2

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    args = [randn(1, H, W, D), randn(1, H, W, 4, D), randn(1, H, W, 4, N), randn(1, H, W, 4, N), -randn(4, D, N).exp()]
    args[4][0] *= 1e-4
    g = randn(1, H, W, D)
    leaves = [t.requires_grad_() for t in args]
    wide = [t.detach().double().requires_grad_() for t in args]
    runs = []
    for function, tensors in ((effvit.ops.selective_scan2d, leaves), (SPEC.reference, leaves), (SPEC.reference, wide)):
        out = function(*tensors)
        runs.append((out.detach(), *torch.autograd.grad(out, tensors, g.to(out.dtype))))
    eps = torch.finfo(torch.float32).eps
    outputs, gradients = SPEC.magnitudes((*(t.detach() for t in wide), None, None), {}, (g.double(),), eps)
    sizes = (outputs["out"], *(gradients[n] for n in SPEC.tensors[:5]))
    for name, got, plain, truth, size in zip(("out", *SPEC.tensors[:5]), *runs, sizes, strict=True):
        assert_close_to_truth(got, truth, plain, magnitude=size, name=name)
