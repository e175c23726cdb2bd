"""sparse24_compress: the shared suite, and the canonical form from its description."""

import itertools

import pytest
import torch

import effvit
from effvit.testing import assert_bitwise_equal
from effvit.testing._sparse24 import sparse_weight
from effvit.testing.sparse24_compress import SPEC
from op_suite import ForwardSuite


class TestSparse24Compress(ForwardSuite):
    spec = SPEC

    def other_values(self, x, n):
        return x * n  # zeros stay zeros

    def _stacked(self, args, names, n=3):
        return tuple(torch.stack([a.roll(i, 0) for i in range(n)]) for a in args)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16, torch.float16])
def test_every_group(dtype):
    """All eleven patterns of a group, in both halves of a byte: values and positions, from the description."""
    patterns = [p for p in itertools.product((0, 1), repeat=4) if sum(p) <= 2]
    w = torch.tensor([(*a, *b, *a) for a in patterns for b in patterns]) * torch.arange(1, 13)
    values, meta = effvit.sparse24_compress(w.to(dtype))
    assert values.dtype == dtype and meta.dtype == torch.uint8
    for row, found, nibbles in zip(w.tolist(), values.tolist(), meta.tolist(), strict=True):
        for group in range(3):
            four = row[4 * group : 4 * group + 4]
            places = [i for i in range(4) if four[i]]
            if len(places) < 2:
                places = sorted({3, *(places or [2])}) if places != [3] else [2, 3]
            nibble = nibbles[group // 2] >> 4 * (group % 2) & 15
            assert nibble == places[0] | places[1] << 2
            assert found[2 * group : 2 * group + 2] == [four[i] for i in places]
        assert nibbles[1] >> 4 == 0b1110
    assert_bitwise_equal(effvit.sparse24_decompress(values, meta), w.to(dtype))


def test_gradients_are_those_of_the_kept():
    w = sparse_weight(6, 12, torch.float32, torch.Generator().manual_seed(0), keep=2).requires_grad_()
    values, meta = effvit.sparse24_compress(w)
    back = effvit.sparse24_decompress(values, meta)
    (found,) = torch.autograd.grad(back, w, torch.full_like(w, 3))
    assert_bitwise_equal(found, 3.0 * (w != 0))
