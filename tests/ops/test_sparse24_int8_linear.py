"""sparse24_int8_linear: the shared suite, and that it is int8_linear of the decompressed weight."""

import pytest
import torch

import effvit
from effvit.testing import backends
from effvit.testing.sparse24_int8_linear import SPEC, sparse
from op_suite import OpSuite


class TestSparse24Int8Linear(OpSuite):
    spec = SPEC

    @pytest.mark.parametrize("name", [b.name for b in backends("sparse24_int8_linear")])
    def test_every_position(self, name):
        """Bit for bit the sums of the dense weight, every pair of positions beside every other."""
        backend = next(b for b in backends("sparse24_int8_linear") if b.name == name)
        generator = torch.Generator().manual_seed(1)
        for m, n, k in [(5, 7, 36)] if backend.slow else [(5, 36, 64), (13, 40, 100), (60, 130, 516)]:
            w = sparse(n, k, generator)
            x = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
            values, meta = effvit.sparse24_compress(w)
            tensors = [t.to(backend.device) for t in (x, values, meta, torch.ones(m), torch.ones(n))]
            result = backend.forward(*tensors, None, None, out_dtype=3)
            assert torch.equal(result.cpu(), (x.long() @ w.long().T).int())


def test_is_int8_linear_of_the_decompressed_weight():
    generator = torch.Generator().manual_seed(3)
    w = sparse(50, 44, generator)
    x = torch.randint(-128, 128, (2, 9, 44), generator=generator, dtype=torch.int8)
    x_scale, w_scale, bias = torch.rand(2, 9), torch.rand(50) * 0.01, torch.randn(50)
    values, meta = effvit.sparse24_compress(w)
    packed = effvit.sparse24_prepack(values, meta)
    for options in (
        {},
        {"activation": "gelu", "out_dtype": torch.bfloat16},
        {"out_dtype": torch.int8, "out_scale": 0.3},
    ):
        expected = effvit.int8_linear(x, w, x_scale, w_scale, bias, **options)
        assert torch.equal(effvit.sparse24_int8_linear(x, values, meta, x_scale, w_scale, bias, **options), expected)
        assert torch.equal(effvit.sparse24_int8_linear(x, packed, None, x_scale, w_scale, bias, **options), expected)
