"""glu: the shared suite, and torch's own."""

import torch

import effvit
from effvit.testing.glu import SPEC
from op_suite import OpSuite


class TestGlu(OpSuite):
    spec = SPEC


def test_is_torchs_own():
    x = torch.randn(3, 5, 34)
    torch.testing.assert_close(effvit.glu(x), torch.nn.functional.glu(x))
