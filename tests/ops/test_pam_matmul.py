"""pam_matmul: the shared suite, products bit by bit, and the derivative of the affine piece."""

import numpy as np
import pytest
import torch
from int_oracle import pam as pam_of_bits

import effvit
from effvit.reference.pam_matmul import pam
from effvit.testing import backends
from effvit.testing.pam_matmul import SPEC
from op_suite import OpSuite


def nasty(rng, n):
    """Numbers of every exponent, zeros of both signs, subnormal ones, the largest and the least."""
    bits = rng.integers(0, 2**32, n, dtype=np.uint32)
    x = np.where((bits & 0x7F800000) == 0x7F800000, 1.5, bits.view(np.float32)).astype(np.float32)
    special = np.array(
        [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-45, 2.0**-126, 3.4028235e38, -3.4028235e38, 2.0**127, 0.5, 2.0]
    )
    x[: len(special)] = special[:n]
    return x


class TestPamMatmul(OpSuite):
    spec = SPEC

    @pytest.mark.parametrize("name", [b.name for b in backends("pam_matmul")])
    def test_products_are_those_of_the_bits(self, name):
        """K = 1: every result is one product, bit for bit that of integers (but the sign of zero)."""
        backend = next(b for b in backends("pam_matmul") if b.name == name)
        rng = np.random.default_rng(0)
        m, n = (20, 30) if backend.slow else (300, 200)
        for x, w in (
            (nasty(rng, m), nasty(rng, n)),
            (rng.standard_normal(m, np.float32), rng.standard_normal(n, np.float32)),
            (rng.standard_normal(m, np.float32) * (rng.random(m) < 0.5), rng.standard_normal(n, np.float32)),
        ):
            x, w = (t.astype(np.float32) for t in (x, w))
            given = [torch.from_numpy(t[:, None]).to(backend.device) for t in (x, w)]
            with np.errstate(all="ignore"):
                expected = pam_of_bits(x[:, None], w[None]) + np.float32(0)
            found = backend.forward(*given).cpu().numpy() + np.float32(0)
            assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))

    @pytest.mark.parametrize("name", [b.name for b in backends("pam_matmul")])
    def test_what_is_not_finite_stays_visible(self, name):
        backend = next(b for b in backends("pam_matmul") if b.name == name)
        x, w = torch.randn(9, 20), torch.randn(18, 20)
        x[1, 3], x[7, 19], w[5, 0] = float("nan"), float("inf"), float("-inf")
        y = backend.forward(x.to(backend.device), w.to(backend.device)).cpu()
        wrong = torch.zeros(9, 18, dtype=torch.bool)
        wrong[[1, 7]], wrong[:, 5] = True, True
        assert torch.equal(torch.isnan(y), wrong) and torch.isfinite(y[~wrong]).all()


def test_the_definition_is_the_bits():
    rng = np.random.default_rng(1)
    a, b = nasty(rng, 20_000), nasty(rng, 20_000)[::-1].copy()
    with np.errstate(all="ignore"):
        expected = pam_of_bits(a, b)
    for dtype in (torch.float32, torch.float64):
        found = pam(torch.from_numpy(a).to(dtype), torch.from_numpy(b).to(dtype)).float().numpy()
        assert np.array_equal(found + np.float32(0), expected + np.float32(0)), dtype


def test_is_near_a_product_and_exact_for_powers_of_two():
    a = torch.randn(2000, dtype=torch.float64)
    b = torch.randn(2000, dtype=torch.float64)
    ratio = pam(a, b) / (a * b)
    assert (ratio <= 1 + 1e-12).all() and (ratio >= 8 / 9 - 1e-12).all() and (ratio < 0.9).any()
    powers = torch.exp2(torch.randint(-9, 9, (2000,)).double())
    assert torch.equal(pam(a, powers), a * powers) and torch.equal(pam(powers, -a), -a * powers)


def test_derivative_is_that_of_the_piece():
    """sign(b) 2^(exponent of b, plus 1 where the mantissas carry): powers of two."""
    a, b = torch.randn(500, requires_grad=True), torch.randn(500)
    (found,) = torch.autograd.grad(pam(a, b).sum(), a)
    m, n = (torch.frexp(t.detach().abs()).mantissa * 2 - 1 for t in (a, b))
    exponent = torch.frexp(b).exponent - 1 + (m + n >= 1).int()
    assert torch.equal(found, torch.sign(b) * torch.exp2(exponent.float()))


def test_leading_dims():
    x, w = torch.randn(2, 3, 20), torch.randn(7, 20)
    flat = effvit.pam_matmul(x.view(6, 20), w)
    assert torch.equal(effvit.pam_matmul(x, w), flat.view(2, 3, 7))
    assert torch.equal(effvit.pam_matmul(x[0, 0], w), flat[0])
