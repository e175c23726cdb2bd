"""int8_matmul: the shared suite, and the same bits as int64 NumPy on every backend."""

import int_oracle
import pytest
import torch
from integer_suite import IntegerSuite, numpy_dtype

import effvit
from effvit.testing.int8_matmul import DTYPES, SPEC, operand


class TestInt8Matmul(IntegerSuite):
    spec = SPEC
    FUZZ_ROWS = 4_000

    def oracle(self, args, kwargs):
        options = self.spec.declared.complete(kwargs)
        dtype = numpy_dtype(options.pop("out_dtype"))
        return int_oracle.int8_matmul(*(a.numpy() for a in args), **options, dtype=dtype)


def test_public_function():
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        a, b = operand((2, 5, 40), dtype, generator), operand((2, 40, 7), torch.int8, generator)
        exact = a.long() @ b.long()
        assert torch.equal(effvit.int8_matmul(a, b), exact.int())
        assert torch.equal(effvit.int8_matmul(a, b.mT.contiguous(), transpose_b=True), exact.int())
        scale = float(exact.abs().max()) / 150
        y = effvit.int8_matmul(a, b, scale=0.02, out_scale=torch.tensor(0.02 * scale), out_dtype=torch.int8)
        difference = y.double() - (exact.double() / scale).clamp(-128, 127)
    assert difference.abs().max() <= 0.5 + 1e-4
    assert y.max() == 127 or y.min() == -128


def test_saturates_at_int32():
    """The sum, before it is rescaled."""
    a = torch.full((1, 20), -(2**15), dtype=torch.int16)
    assert effvit.int8_matmul(a, a, transpose_b=True).item() == 2**31 - 1
    assert effvit.int8_matmul(a, -(a + 1), transpose_b=True).item() == -(2**31)
    y = effvit.int8_matmul(a, a, transpose_b=True, multiplier=2**30, shift=46, out_dtype=torch.int16)
    assert y.item() == 2**15 - 1


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("out_scale must be given together with scale", {"scale": 0.1}),
        ("scale must be given together with out_scale", {"out_scale": 0.1}),
        ("multiplier must be 0 where scale is given", {"scale": 0.1, "out_scale": 0.1, "multiplier": 3, "shift": 2}),
        ("scale must be positive", {"scale": -0.1, "out_scale": 0.1}),
        ("out_scale must be such that it divides", {"scale": 1e12, "out_scale": 1e-3}),
    ],
)
def test_scales(match, options):
    a = torch.ones(2, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"effvit::int8_matmul: {match}"):
        effvit.int8_matmul(a, a, transpose_b=True, **options)
