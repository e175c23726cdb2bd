"""block_sparse_linear: the shared suite, PyTorch's own BSR, and effvit.block_sparse."""

import pytest
import torch

import effvit
from effvit import block_sparse
from effvit.ops.block_sparse_linear import NAMES
from effvit.reference.block_sparse_linear import DERIVATIVES
from effvit.reference.int8_linear import ACTIVATIONS
from effvit.testing import assert_bitwise_equal
from effvit.testing.block_sparse_linear import SPEC, good_call, structure
from op_suite import OpSuite


class TestBlockSparseLinear(OpSuite):
    spec = SPEC

    def _stacked(self, args, names, n=3):
        """Other blocks of the same number in each row: what is mapped must be a right description."""
        stacked = list(super()._stacked(args, set(names) - {"crow", "columns"}, n))
        crow, columns = args[2:4]
        across = args[0].shape[-1] // args[1].shape[-1]
        if "crow" in names:
            stacked[2] = torch.stack([crow] * n)
        if "columns" in names:
            mirrored = [across - 1 - columns[a:b].flip(0) for a, b in zip(crow, crow[1:], strict=False)]
            stacked[3] = torch.stack([columns, torch.cat(mirrored), columns])
        return tuple(stacked)


def _weight(down, across, block, density, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    crow, columns = structure(down, across, density, generator)
    values = torch.randn(len(columns), block, block, generator=generator).to(dtype)
    size = (down * block, across * block)
    return values, crow, columns, torch.sparse_bsr_tensor(crow, columns, values, size).to_dense()


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("down", "across", "block"), [(3, 5, 16), (2, 3, 32), (1, 1, 16), (4, 2, 32)])
def test_form_is_pytorchs_bsr(down, across, block, density):
    values, crow, columns, dense = _weight(down, across, block, density)
    assert_bitwise_equal(block_sparse.decompress(values, crow, columns, across * block), dense)
    for found, expected in zip(block_sparse.compress(dense, block=block), (values, crow, columns), strict=True):
        assert_bitwise_equal(found, expected)


@pytest.mark.parametrize("activation", NAMES)
def test_is_a_linear_layer(activation):
    """Values and gradients of nn.functional's, those of the weight by way of compress, in float64 references."""
    *_, dense = _weight(3, 4, 16, 0.5, dtype=torch.float64)
    w, bias = (dense / 8).requires_grad_(), torch.randn(48, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 5, 64, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 5, 48, dtype=torch.float64)
    act = {"none": torch.nn.Identity(), "relu": torch.nn.ReLU(), "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU()}
    residual = torch.randn(2, 5, 48, dtype=torch.float64, requires_grad=True)
    expected = act[activation](torch.nn.functional.linear(x, w, bias) + residual)
    values, crow, columns = block_sparse.compress(w)
    definition = SPEC.declared.definition
    found = definition(x, values, crow, columns, bias, residual, activation=NAMES.index(activation))
    torch.testing.assert_close(found, expected)
    e = torch.autograd.grad(expected, (x, w, bias, residual), grad)
    f = torch.autograd.grad(found, (x, w, bias, residual), grad)
    for a, b in zip(f, (e[0], e[1] * (w != 0), *e[2:]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", NAMES)
def test_derivatives_of_activations(activation):
    y = torch.linspace(-9, 9, 1000, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation](y).sum(), y)
    torch.testing.assert_close(DERIVATIVES[activation](y.detach()), expected)


def test_lowers_to_aten():
    """The shared suite leaves out whatever has int32 tensors."""
    args, kwargs = SPEC.sample("small_gelu").build()

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return effvit.block_sparse_linear(*tensors, activation="gelu")

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch}, *(None,) * 4, {0: batch})
    program = torch.export.export(Module(), args, dynamic_shapes={"tensors": shapes}, strict=False)
    program = program.run_decompositions(effvit.decompositions())
    targets = {n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert targets and all(t.namespace == "aten" for t in targets), targets
    for call in (args, SPEC.resize(args, kwargs)[0]):
        torch.testing.assert_close(program.module()(*call), effvit.block_sparse_linear(*call, activation="gelu"))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("block", [16, 32])
def test_mask_keeps_the_largest(block, density, balanced):
    w = torch.randn(4 * block, 8 * block, generator=torch.Generator().manual_seed(block))
    w[:block] *= 3
    mask = block_sparse.mask(w, density=density, block=block, balanced=balanced)
    assert mask.dtype == torch.bool and mask.shape == w.shape
    kept = [[mask[block * i, block * j].item() for j in range(8)] for i in range(4)]
    for i in range(4):
        for j in range(8):
            assert (mask[block * i : block * (i + 1), block * j : block * (j + 1)] == kept[i][j]).all()
    norms = [[float(w[block * i : block * (i + 1), block * j : block * (j + 1)].double().norm()) for j in range(8)]
             for i in range(4)]  # fmt: skip
    for group in [[i] for i in range(4)] if balanced else [[0, 1, 2, 3]]:
        inside = [norms[i][j] for i in group for j in range(8) if kept[i][j]]
        outside = [norms[i][j] for i in group for j in range(8) if not kept[i][j]]
        assert len(inside) == round(density * 8 * len(group))
        assert min(inside, default=9e9) >= max(outside, default=0)
    values, crow, columns = block_sparse.compress(w, block=block, mask=mask)
    assert_bitwise_equal(block_sparse.decompress(values, crow, columns, 8 * block), w * mask)


def test_mask_of_equals_and_nan():
    w = torch.ones(32, 64)
    assert block_sparse.mask(w, density=0.25)[::16, ::16].tolist() == [[True, True, False, False], [False] * 4]
    w[20, 40] = float("nan")
    assert block_sparse.mask(w, density=0.25)[::16, ::16].tolist() == [
        [True] + [False] * 3,
        [False, False, True, False],
    ]


def test_a_mask_keeps_blocks_of_zeros():
    mask = torch.ones(16, 32, dtype=torch.bool)
    values, crow, columns = block_sparse.compress(torch.zeros(16, 32), mask=mask)
    assert values.shape == (2, 16, 16) and crow.tolist() == [0, 2] and columns.tolist() == [0, 1]
    assert block_sparse.compress(torch.zeros(16, 32))[0].shape == (0, 16, 16)


def _parts(**change):
    return [{**good_call(), **change}[n] for n in ("values", "crow", "columns")]


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "block must be 16 or 32, got 8", lambda w: block_sparse.mask(w, density=0.5, block=8)),
        (ValueError, "density must be between 0 and 1, got 1.5", lambda w: block_sparse.mask(w, density=1.5)),
        (TypeError, "density must be a real number", lambda w: block_sparse.mask(w, density="half")),
        (ValueError, r"w must be \[N, K\] .* multiples of the block, 16, got \[32, 40\]",
         lambda w: block_sparse.mask(w[:, :40], density=0.5)),
        (ValueError, r"w must be \[N, K\]", lambda w: block_sparse.compress(w[0])),
        (TypeError, "w must be a floating-point tensor, got torch.int8", lambda w: block_sparse.compress(w.char())),
        (TypeError, "w must be a torch.Tensor, got list", lambda w: block_sparse.compress([1])),
        (TypeError, "mask must be torch.bool", lambda w: block_sparse.compress(w, mask=w)),
        (ValueError, r"mask must be \[32, 64\] .*got \[16, 64\]", lambda w: block_sparse.compress(w, mask=w[:16] > 0)),
        (ValueError, "k must be a multiple of 16, got 40", lambda w: block_sparse.decompress(*_parts(), 40)),
        (ValueError, "columns must be between 0 and 1, got 2", lambda w: block_sparse.decompress(*_parts(), 32)),
        (ValueError, r"values must be \[Z, B, B\]",
         lambda w: block_sparse.decompress(*_parts(values=torch.zeros(3, 16, 32)), 48)),
        (TypeError, "crow must be torch.int32",
         lambda w: block_sparse.decompress(*_parts(crow=torch.tensor([0, 2, 3])), 48)),
        (ValueError, r"columns must be \[Z\] like values",
         lambda w: block_sparse.decompress(*_parts(values=torch.zeros(2, 16, 16)), 48)),
    ],
)  # fmt: skip
def test_errors(error, match, call):
    with pytest.raises(error, match=f"effvit::block_sparse: {match}"):
        call(torch.randn(32, 64))
