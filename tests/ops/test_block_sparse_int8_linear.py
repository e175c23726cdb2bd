"""block_sparse_int8_linear: the shared suite, exact sums, and that it is int8_linear of the dense weight."""

import pytest
import torch

import effvit
from effvit import block_sparse
from effvit.reference.block_sparse_linear import dense_weight
from effvit.testing import backends
from effvit.testing.block_sparse_int8_linear import SPEC, weights
from op_suite import OpSuite


class TestBlockSparseInt8Linear(OpSuite):
    spec = SPEC

    def _stacked(self, args, names, n=3):
        """The same places for all: what is mapped must be a right description."""
        names = set(names)
        stacked = list(super()._stacked(args, names - {"crow", "columns"}, n))
        for i, name in ((2, "crow"), (3, "columns")):
            if name in names:
                stacked[i] = torch.stack([args[i]] * n)
        return tuple(stacked)

    @pytest.mark.parametrize("name", [b.name for b in backends("block_sparse_int8_linear")])
    @pytest.mark.parametrize("block", [16, 32])
    def test_exact_sums(self, name, block):
        """Bit for bit the int64 sums, of every number of rows of a tile, at the densities where a tail is one block."""
        backend = next(b for b in backends("block_sparse_int8_linear") if b.name == name)
        generator = torch.Generator().manual_seed(block)
        shapes = [(5, 2, 3)] if backend.slow else [(m, 3, 5) for m in range(1, 18)] + [(100, 7, 9)]
        for m, down, across in shapes:
            n, k = down * block, across * block
            for density in (0.2, 0.6, 1.0):
                parts = weights(block, density)(n, k, generator)
                x = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
                tensors = [t.to(backend.device) for t in (x, *parts, torch.ones(m), torch.ones(n))]
                result = backend.forward(*tensors, None, None, out_dtype=3).cpu()
                w = dense_weight(*parts, k)
                assert torch.equal(result, (x.long() @ w.long().T).int())


@pytest.mark.parametrize("block", [16, 32])
def test_is_int8_linear_of_the_dense_weight(block):
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(4 * block, 6 * block, generator=generator)
    w = w * block_sparse.mask(w, density=0.5, block=block)
    q, w_scale = effvit.quantize_int8(w)
    values, crow, columns = block_sparse.compress(w, block=block)
    x = torch.randint(-128, 128, (2, 9, 6 * block), generator=generator, dtype=torch.int8)
    x_scale, bias = torch.rand(2, 9), torch.randn(4 * block)
    values = block_sparse.compress(q.float(), block=block, mask=w != 0)[0].to(torch.int8)
    for options in (
        {},
        {"activation": "gelu", "out_dtype": torch.bfloat16},
        {"out_dtype": torch.int8, "out_scale": 0.3},
    ):
        for scale in (w_scale, w_scale[:1]):
            expected = effvit.int8_linear(x, q, x_scale, scale, bias, **options)
            found = effvit.block_sparse_int8_linear(x, values, crow, columns, x_scale, scale, bias, **options)
            assert torch.equal(found, expected)
