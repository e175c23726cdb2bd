"""int8_linear: the shared suite, exactness, the epilogue, and what the public function adds."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import effvit
from effvit.ops._declaration import OUT_DTYPES
from effvit.ops._int8 import NAMES
from effvit.testing import assert_bitwise_equal, backends
from effvit.testing.int8_linear import SPEC
from op_suite import OpSuite


class TestInt8Linear(OpSuite):
    spec = SPEC

    @pytest.mark.parametrize("name", [b.name for b in backends("int8_linear")])
    def test_sums_are_exact(self, name):
        """Bit for bit those of int64, also the largest that there are."""
        backend = next(b for b in backends("int8_linear") if b.name == name)
        generator = torch.Generator().manual_seed(1)
        shapes = [(5, 7, 33), (13, 40, 100)] if backend.slow else [(13, 40, 100), (97, 130, 517), (30, 65, 4096)]
        for m, n, k in shapes:
            extremes = torch.tensor([-128, -127, 127], dtype=torch.int8)
            for x, w in (
                (torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8),
                 torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)),
                (torch.full((m, k), -128, dtype=torch.int8), torch.full((n, k), -128, dtype=torch.int8)),
                (extremes[torch.randint(0, 3, (m, k), generator=generator)],
                 extremes[torch.randint(0, 3, (n, k), generator=generator)]),
            ):  # fmt: skip
                expected = torch.from_numpy(x.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T)
                ones = torch.ones(m), torch.ones(n)
                tensors = [t.to(backend.device) for t in (x, w, *ones)]
                result = backend.forward(*tensors, None, None, out_dtype=3)
                assert_bitwise_equal(result.cpu(), expected.to(torch.int32))


def _call(m=6, n=20, k=36):
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    w = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    return x, w, torch.rand(m, generator=generator) * 0.01, torch.rand(n, generator=generator) * 0.1


def test_is_a_linear_layer_of_what_the_integers_stand_for():
    x, w, x_scale, w_scale = _call()
    bias = torch.randn(20)
    expected = F.linear(x.double() * x_scale[:, None], w.double() * w_scale[:, None], bias.double())
    torch.testing.assert_close(
        effvit.int8_linear(x, w, x_scale, w_scale, bias).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_leading_dims_and_scales_of_one_element():
    x, w, x_scale, w_scale = _call()
    flat = effvit.int8_linear(x, w, x_scale, w_scale)
    assert torch.equal(effvit.int8_linear(x.view(2, 3, 36), w, x_scale.view(2, 3), w_scale), flat.view(2, 3, 20))
    assert torch.equal(effvit.int8_linear(x[0], w, x_scale[:1], w_scale), flat[0])
    one = effvit.int8_linear(x, w, x_scale[:1], w_scale[:1])
    assert torch.equal(one, effvit.int8_linear(x, w, x_scale[:1].repeat(6), w_scale[:1].repeat(20)))
    residual = torch.randn(2, 3, 20)
    y = effvit.int8_linear(x.view(2, 3, 36), w, x_scale.view(2, 3), w_scale, None, residual)
    torch.testing.assert_close(y, flat.view(2, 3, 20) + residual)


def test_packed_weights_give_the_same():
    x, w, x_scale, w_scale = _call(17, 50, 31)
    packed = effvit.int8_prepack(w)
    for dtype, scale in ((torch.float32, None), (torch.bfloat16, None), (torch.int8, 0.05)):
        options = {"out_dtype": dtype, "out_scale": scale, "activation": "gelu"}
        plain = effvit.int8_linear(x, w, x_scale, w_scale, **options)
        assert torch.equal(effvit.int8_linear(x, packed, x_scale, w_scale, **options), plain)


def test_requantisation_saturates():
    x, w, x_scale, w_scale = _call()
    y = effvit.int8_linear(x, w, x_scale, w_scale)
    q = effvit.int8_linear(x, w, x_scale, w_scale, out_dtype=torch.int8, out_scale=float(y.abs().max()) / 500)
    assert q.min() == -128 and q.max() == 127


def test_gradients_of_scales_bias_and_residual():
    x, w, x_scale, w_scale = _call()
    leaves = [t.requires_grad_() for t in (x_scale, w_scale, torch.randn(20), torch.randn(6, 20))]
    grad = torch.randn(6, 20)
    found = torch.autograd.grad(effvit.int8_linear(x, w, *leaves, activation="silu"), leaves, grad)
    y = x.float() @ w.float().mT * (leaves[0][:, None] * leaves[1]) + leaves[2] + leaves[3]
    expected = torch.autograd.grad(F.silu(y), leaves, grad)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)


def _runs(op, *args, **options):
    """{backend: result} of a small call."""
    found = {}
    for b in backends(op):
        given = (None if a is None else a.to(b.device) for a in args)
        found[b.name] = b.forward(*given, **options).cpu()
    return found


def test_what_is_not_finite_stays_with_its_row():
    """A row with a NaN or an infinity has such a scale; int8 results have 0 where there is no number."""
    x = torch.randn(6, 20)
    x[1, 3], x[4, 7] = float("nan"), float("inf")
    q, scale = effvit.quantize_int8(x)
    w = torch.randint(-127, 128, (18, 20), dtype=torch.int8)
    w_scale, bias = torch.full((18,), 0.01), torch.randn(18)
    good = [0, 2, 3, 5]
    for activation in range(4):
        finite = effvit.int8_linear(q[good], w, scale[good], w_scale, bias, activation=NAMES[activation])
        for name, y in _runs("int8_linear", q, w, scale, w_scale, bias, activation=activation, out_dtype=0).items():
            assert not torch.isfinite(y[1]).any(), name
            assert torch.isfinite(y[good]).all(), name
            torch.testing.assert_close(y[good], finite, rtol=1e-5, atol=1e-5)
    results = _runs("int8_linear", q, w, scale, w_scale, bias, out_dtype=OUT_DTYPES.index("int8"), out_scale=0.1)
    for name, y in results.items():
        assert (y[1] == 0).all(), name


def test_gelu_of_large_numbers():
    """The tail is 0, not x times the rounding error of 1."""
    one = torch.ones(18, 1, dtype=torch.int8)
    v = torch.tensor([6.0, 10.0, 1e3, 1e6, 1e20])
    for sign in (1, -1):
        x = torch.full((5, 1), sign, dtype=torch.int8)
        for name, y in _runs("int8_linear", x, one, v, torch.ones(18), activation=NAMES.index("gelu")).items():
            expected = torch.nn.functional.gelu(sign * v.double()).float()[:, None].expand(5, 18)
            torch.testing.assert_close(y, expected, rtol=3e-7, atol=1e-8, msg=name)


def test_a_packed_weight_of_another_kind_or_shape_is_refused():
    w = torch.randint(-127, 128, (6, 16), dtype=torch.int8)
    x, packed = torch.ones(2, 16, dtype=torch.int8), effvit.int8_prepack(w)
    scale = torch.ones(2)

    def call(x, weight, n):
        return lambda: effvit.int8_linear(x, weight, scale, torch.ones(n))

    def raw(x, weight, n):
        return lambda: torch.ops.effvit.int8_linear(x, weight, scale, torch.ones(n))

    values, meta = effvit.sparse24_compress(torch.ones(8, 32, dtype=torch.int8) * torch.tensor([1, 1, 0, 0] * 8).char())
    sparse = effvit.sparse24_prepack(values, meta)  # 448 bytes wide, as int8_prepack makes K = 24
    for make in (call, raw):
        for n in (4, 10):
            with pytest.raises(
                ValueError if make is call else Exception, match=rf"from \[N, K\] = \[{n}, 16\], got one of \[6, 16\]"
            ):
                make(x, packed, n)()
        with pytest.raises(Exception, match=r"from \[N, K\] = \[6, 13\], got one of \[6, 16\]"):
            make(x[:, :13], packed, 6)()
        with pytest.raises(Exception, match="packed by int8_prepack, got something else of that size"):
            make(torch.ones(2, 24, dtype=torch.int8), sparse, 8)()
    dense = effvit.int8_prepack(torch.ones(8, 24, dtype=torch.int8))
    with pytest.raises(ValueError, match="packed by sparse24_prepack, got something else of that size"):
        effvit.sparse24_int8_linear(torch.ones(2, 32, dtype=torch.int8), dense, None, scale, torch.ones(8))
