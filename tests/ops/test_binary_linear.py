"""binary_linear: the shared suite, exactness against an integer product, and what the public function adds."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from int_oracle import binary_product

import effvit
from effvit.reference.sign_bits import pack_bits
from effvit.testing import assert_bitwise_equal, backends
from effvit.testing.binary_linear import SPEC
from op_suite import OpSuite


class TestBinaryLinear(OpSuite):
    spec = SPEC

    @pytest.mark.parametrize("name", [b.name for b in backends("binary_linear")])
    @pytest.mark.parametrize("unipolar", [False, True])
    def test_sums_are_exact(self, name, unipolar):
        backend = next(b for b in backends("binary_linear") if b.name == name)
        rng = np.random.default_rng(1)
        shapes = [(5, 7, 33), (9, 20, 300)] if backend.slow else [(13, 40, 100), (97, 130, 517), (30, 65, 4096)]
        for m, n, k in shapes:
            x, w = (rng.integers(0, 256, (rows, -(-k // 8)), dtype=np.uint8) for rows in (m, n))
            for xs, ws in ((x, w), (x | 255, w), (x | 255, w & 0), (x, np.tile(x[:1], (n, 1)))):
                tensors = [torch.from_numpy(t).to(backend.device) for t in (xs, ws)]
                ones = [torch.ones(rows, device=backend.device) for rows in (m, n)]
                result = backend.forward(*tensors, *ones, None, None, out_dtype=3, depth=k, unipolar=unipolar)
                expected = torch.from_numpy(binary_product(xs, ws, k, unipolar).astype(np.int32))
                assert_bitwise_equal(result.cpu(), expected)

    @pytest.mark.parametrize("name", [b.name for b in backends("binary_linear")])
    def test_fuzz(self, name):
        """At least 10,000 rows on compiled instruction sets."""
        backend = next(b for b in backends("binary_linear") if b.name == name)
        rng = np.random.default_rng(2)
        rows, most = 0, 60 if backend.slow else 10_000
        while rows < most:
            m, n, k = (int(i) for i in rng.integers(1, (12, 40, 60) if backend.slow else (400, 150, 900)))
            x, w = (rng.integers(0, 256, (r, -(-k // 8)), dtype=np.uint8) for r in (m, n))
            unipolar = bool(rng.integers(2))
            tensors = [torch.from_numpy(t).to(backend.device) for t in (x, w)]
            ones = [torch.ones(r, device=backend.device) for r in (m, n)]
            result = backend.forward(*tensors, *ones, None, None, out_dtype=3, depth=k, unipolar=unipolar)
            assert np.array_equal(result.cpu().numpy(), binary_product(x, w, k, unipolar)), (m, n, k, unipolar)
            rows += m


def _call(m=6, n=20, k=37):
    x, w = torch.randn(m, k), torch.randn(n, k)
    xb, xs = effvit.sign_bits(x)
    wb, ws = effvit.sign_bits(w)
    return x, w, xb, wb, xs, ws


def test_is_a_linear_layer_of_signs():
    x, w, xb, wb, xs, ws = _call()
    bias = torch.randn(20)
    signs = [torch.where(t >= 0, 1.0, -1.0).double() * s.double()[:, None] for t, s in ((x, xs), (w, ws))]
    y = effvit.binary_linear(xb, wb, xs, ws, bias, depth=37, activation="gelu")
    torch.testing.assert_close(y.double(), F.gelu(F.linear(*signs, bias.double())), rtol=1e-5, atol=1e-5)


def test_probabilities_times_signs():
    p, v = torch.rand(9, 50), torch.randn(16, 50)
    threshold = torch.full((9,), 0.6)
    bits, scale = effvit.sign_bits(p, threshold)
    vb, vs = effvit.sign_bits(v)
    y = effvit.binary_linear(bits, vb, scale, vs, depth=50, unipolar=True)
    expected = ((p >= 0.6) * scale[:, None]).double() @ (torch.where(v >= 0, 1.0, -1.0) * vs[:, None]).double().mT
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_leading_dims_and_scales_of_one_element():
    _, _, xb, wb, xs, ws = _call()
    flat = effvit.binary_linear(xb, wb, xs, ws, depth=37)
    assert torch.equal(effvit.binary_linear(xb.view(2, 3, 5), wb, xs.view(2, 3), ws, depth=37), flat.view(2, 3, 20))
    assert torch.equal(effvit.binary_linear(xb[0], wb, xs[:1], ws, depth=37), flat[0])
    one = effvit.binary_linear(xb, wb, xs[:1], ws[:1], depth=37)
    assert torch.equal(one, effvit.binary_linear(xb, wb, xs[:1].repeat(6), ws[:1].repeat(20), depth=37))


def test_bits_beyond_depth_do_not_count():
    _, _, xb, wb, xs, ws = _call(k=35)
    noise = [t.clone() for t in (xb, wb)]
    for t in noise:
        t[:, -1] |= 0xF8
    for b in backends("binary_linear"):
        given = [t.to(b.device) for t in (*noise, xs, ws)]
        options = {"depth": 35, "out_dtype": 3}
        expected = effvit.binary_linear(xb, wb, xs, ws, depth=35, out_dtype=torch.int32)
        assert_bitwise_equal(b.forward(*given, None, None, **options).cpu(), expected, name=b.name)


def test_packing_of_the_definition_is_that_of_numpy():
    bits = torch.rand(3, 5, 21) < 0.5
    assert np.array_equal(pack_bits(bits).numpy(), np.packbits(bits.numpy(), axis=-1, bitorder="little"))


def test_gradients_of_scales_and_bias():
    _, _, xb, wb, xs, ws = _call()
    leaves = [t.clone().requires_grad_() for t in (xs, ws, torch.randn(20))]
    grad = torch.randn(6, 20)
    found = torch.autograd.grad(effvit.binary_linear(xb, wb, *leaves, depth=37), leaves, grad)
    acc = effvit.binary_linear(xb, wb, xs, ws, depth=37, out_dtype=torch.int32).float()
    expected = torch.autograd.grad(acc * (leaves[0][:, None] * leaves[1]) + leaves[2], leaves, grad)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)
