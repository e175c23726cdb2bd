"""int8_prepack: the shared suite, and the way back."""

import torch

import effvit
from effvit.reference.int8_prepack import int8_unpack
from effvit.testing.int8_prepack import SPEC
from op_suite import ForwardSuite


class TestInt8Prepack(ForwardSuite):
    spec = SPEC


def test_is_invertible():
    for n in (1, 15, 16, 17, 40):
        for k in (0, 1, 3, 4, 5, 64, 66):
            w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
            assert torch.equal(int8_unpack(effvit.int8_prepack(w), n, k), w)
