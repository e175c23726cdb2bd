"""sparse24_prepack: the shared suite, and the layout from its description."""

import pytest
import torch

import effvit
from effvit.reference.sparse24_prepack import sparse24_unpack
from effvit.testing import assert_bitwise_equal
from effvit.testing._sparse24 import compressed
from effvit.testing.sparse24_prepack import SPEC
from op_suite import ForwardSuite


class TestSparse24Prepack(ForwardSuite):
    spec = SPEC


@pytest.mark.parametrize(("n", "k"), [(5, 12), (16, 8), (33, 76), (1, 4), (3, 0)])
def test_layout(n, k):
    """Byte for byte, from the description; and the way back."""
    values, meta = compressed(n, k, torch.int8, torch.Generator().manual_seed(n))
    packed, k8, k32 = effvit.sparse24_prepack(values, meta), -(-k // 8), -(-k // 32)
    assert packed.shape == (-(-n // 16), 64 * (k8 + k32 + 2))
    dense = effvit.sparse24_decompress(values, meta)
    for block, row in enumerate(packed):
        positions = row[64 * k8 : 64 * (k8 + k32)].view(torch.uint8).tolist()
        for i in range(16):
            channel = 16 * block + i
            for step in range(k8):
                for j in range(4):  # the first of either group, then the second of either
                    group, which = 2 * step + j % 2, j // 2
                    place = positions[64 * (step // 4) + 4 * i + j] >> 2 * (step % 4) & 3
                    value = row[64 * step + 4 * i + j]
                    if channel >= n or 4 * group >= k:
                        assert value == 0
                        continue
                    assert place == int(meta[channel, step]) >> 4 * (group % 2) + 2 * which & 3
                    assert value == dense[channel, 4 * group + place] == values[channel, 2 * group + which]
            total = int(dense[channel].sum()) if channel < n else 0
            assert row[64 * (k8 + k32) : -64].view(torch.int32)[i] == total
    for found, expected in zip(sparse24_unpack(packed, n, k), (values, meta), strict=True):
        assert_bitwise_equal(found, expected)
