"""sparse24_mask: the shared suite, and masks by search."""

import itertools

import pytest
import torch

import effvit
from effvit.testing import assert_bitwise_equal
from effvit.testing.sparse24_mask import SPEC
from op_suite import ForwardSuite


class TestSparse24Mask(ForwardSuite):
    spec = SPEC

    def test_public_function(self, framework_sample):
        """bool, where the op returns uint8."""
        (w,), kwargs = framework_sample.build()
        found = effvit.sparse24_mask(w, **SPEC.public_kwargs(kwargs))
        assert found.dtype == torch.bool
        assert_bitwise_equal(found.to(torch.uint8), torch.ops.effvit.sparse24_mask(w, **kwargs))


def _weights():
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        yield torch.randn(32, 24, generator=generator).to(dtype)
        yield torch.randint(-2, 3, (32, 24), generator=generator).to(dtype)


@pytest.mark.parametrize("w", _weights())
def test_magnitude_is_the_first_largest_two(w):
    mask = effvit.sparse24_mask(w).view(-1, 4)
    order = w.abs().view(-1, 4).argsort(dim=1, descending=True, stable=True)[:, :2]
    assert_bitwise_equal(mask, torch.zeros_like(mask).scatter(1, order, True))


@pytest.mark.parametrize("w", _weights())
def test_transposable_is_the_best_of_ninety(w):
    rows = [r for r in itertools.product((0, 1), repeat=4) if sum(r) == 2]
    ways = [way for way in itertools.product(rows, repeat=4) if all(sum(c) == 2 for c in zip(*way, strict=True))]
    assert len(ways) == 90
    ways = torch.tensor(ways, dtype=torch.float64).view(90, 16)
    mask = effvit.sparse24_mask(w, algorithm="transposable")

    def blocks(t):
        return t.double().view(8, 4, 6, 4).transpose(1, 2).reshape(-1, 16)

    assert (mask.view(-1, 4).sum(1) == 2).all() and (mask.mT.reshape(-1, 4).sum(1) == 2).all()
    kept = (blocks(w.abs()) * blocks(mask)).sum(1)
    torch.testing.assert_close(kept, (blocks(w.abs()) @ ways.mT).amax(1), rtol=1e-14, atol=0)


def test_what_is_not_finite_is_kept():
    w = torch.ones(8, 8)
    w[1, 2], w[6, 5], w[3, 3] = float("nan"), float("-inf"), float("nan")
    for algorithm in ("magnitude", "transposable"):
        mask = effvit.sparse24_mask(w, algorithm=algorithm)
        assert mask[~torch.isfinite(w)].all() and (mask.view(-1, 4).sum(1) == 2).all()


def test_algorithm_is_named():
    with pytest.raises(ValueError, match="algorithm must be one of magnitude, transposable, got 'random'"):
        effvit.sparse24_mask(torch.ones(4, 4), algorithm="random")


def test_transposable_compiles_and_exports():
    """The shared suite's symbolic sizes are no multiples of 4; here N is, and the program holds PyTorch's ops alone."""

    class Masked(torch.nn.Module):
        def forward(self, w):
            return w * effvit.sparse24_mask(w, algorithm="transposable")

    module, rows = Masked(), torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(module, (torch.randn(8, 12),), dynamic_shapes=({0: 4 * rows},))
    lowered = program.run_decompositions(effvit.decompositions()).module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for n in (8, 20):
        w = torch.randn(n, 12)
        assert_bitwise_equal(lowered(w), module(w))
        assert_bitwise_equal(compiled(w), module(w))
    w = torch.randn(3, 8, 12)
    found = torch.vmap(module)(w)
    assert_bitwise_equal(found, torch.stack([module(i) for i in w]))
