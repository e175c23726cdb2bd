"""sign_bits: the shared suite, the bits themselves on every backend, and that the scales are the best ones."""

import numpy as np
import pytest
import torch

import effvit
from effvit.testing import backends
from effvit.testing.sign_bits import SPEC
from op_suite import ForwardSuite


class TestSignBits(ForwardSuite):
    spec = SPEC

    @pytest.mark.parametrize("name", [b.name for b in backends("sign_bits") if not b.slow])
    def test_every_bit(self, name):
        """Those that NumPy packs, little end first, of every sample."""
        backend = next(b for b in backends("sign_bits") if b.name == name)
        for sample in SPEC.samples:
            if "empty" in sample.tags:
                continue
            x, threshold = sample.build(torch.float32)[0]
            at = 0.0 if threshold is None else threshold.numpy()[..., None]
            expected = np.packbits(x.numpy() >= at, axis=-1, bitorder="little")
            given = (None if t is None else t.to(backend.device) for t in (x, threshold))
            assert np.array_equal(backend.forward(*given)[0].cpu().numpy(), expected), sample.name


def test_scales_are_the_best_ones():
    """No other scale comes closer to x, neither for -1 and 1 nor for 0 and 1."""
    x = torch.randn(4, 40, dtype=torch.float64)
    for threshold, low in ((None, -1.0), (torch.full((4,), 0.3), 0.0)):
        at = 0.0 if threshold is None else 0.3
        b = torch.where(x.float() >= at, 1.0, low).double()
        best = (x * b).sum(-1) / (b * b).sum(-1)
        _, scale = effvit.sign_bits(x.float(), threshold)
        torch.testing.assert_close(scale.double(), best, rtol=1e-6, atol=1e-7)


def test_what_is_no_number():
    x = torch.ones(2, 20)
    x[0, 3] = float("nan")
    for b in backends("sign_bits"):
        bits, scale = b.forward(x.to(b.device), None)
        assert bits[0, 0] == 0xF7 and bits[1, 0] == 0xFF and torch.isnan(scale[0]) and scale[1] == 1, b.name
