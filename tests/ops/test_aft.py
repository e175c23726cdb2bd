"""aft: the shared suite, its definition against the paper's formulas, and what extreme keys and biases do."""

import functools

import pytest
import torch

import effvit
from effvit._accuracy import assert_bitwise_equal, assert_close_to_truth
from effvit.reference.aft import aft as reference
from effvit.testing import backends, oracle_of
from effvit.testing._oracle import random_output_grads
from effvit.testing.aft import SPEC, _sample
from op_suite import OpSuite


class TestAft(OpSuite):
    spec = SPEC

    def test_public_function(self, framework_sample):
        """It returns the first output."""
        args, kwargs = framework_sample.build()
        assert_bitwise_equal(effvit.aft(*args, **kwargs), self.spec.op()(*args, **kwargs)[0])
        assert_bitwise_equal(effvit.aft(*args), self.spec.op()(*args)[0])


def _inputs(B=2, L=7, M=7, C=5):
    generator = torch.Generator().manual_seed(1)
    q, k, v, w = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((B, L, C), *[(B, M, C)] * 2, (L, M))
    )
    return q, k, v, w


def _by_loops(q, k, v, w):
    """Equation 2 of the paper, sum by sum."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            weights = (k[b] + w[i][:, None]).exp()
            out[b, i] = q[b, i].sigmoid() * (weights * v[b]).sum(0) / weights.sum(0)
    return out


@pytest.mark.parametrize("window", [0, 1, 3])
def test_definition_is_the_papers(window):
    q, k, v, w = _inputs()
    index = torch.arange(7)
    used = w if window == 0 else torch.where((index[:, None] - index).abs() < window, w, 0)
    torch.testing.assert_close(reference(q, k, v, w, window=window)[0], _by_loops(q, k, v, used), rtol=1e-12, atol=0)


def test_simple_is_a_bias_of_zeros():
    q, k, v, w = _inputs(M=4)
    torch.testing.assert_close(reference(q, k, v)[0], _by_loops(q, k, v, torch.zeros(7, 4)), rtol=1e-12, atol=0)
    out, mean, lse = reference(q, k, v)
    assert mean.shape == lse.shape == (2, 1, 5)
    full = reference(q, k, v, torch.zeros(7, 4, dtype=torch.float64))
    torch.testing.assert_close((out, mean.expand_as(full[1]), lse.expand_as(full[2])), full, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("far", [50.0, 90.0, 300.0])
def test_sums_that_the_largest_say_nothing_about(far):
    """Every backend is as accurate where the largest key meets the smallest bias, gradients included."""
    q, k, v, w = (t.float() for t in _inputs(L=9, M=20, C=18))
    k[:, 3, ::2] += far
    w[::2, 3] -= 2 * far
    w[1::2, 5] += far
    grads = torch.randn(3, *q.shape, generator=torch.Generator().manual_seed(3))
    leaves = [t.double().requires_grad_() for t in (q, k, v, w)]
    results = reference(*leaves)
    gradients = torch.autograd.grad(results, leaves, [g.double() for g in grads])
    plain = [t.clone().requires_grad_() for t in (q, k, v, w)]
    yardsticks = torch.autograd.grad(reference(*plain), plain, list(grads))
    _, magnitudes = SPEC.magnitudes(
        tuple(t.detach() for t in leaves),
        {"window": 0},
        tuple(g.double() for g in grads),
        torch.finfo(torch.float32).eps,
    )
    for backend in backends("aft"):
        given = [t.to(backend.device) for t in (q, k, v, w)]
        found = backend.forward(*given, window=0)
        for name, x, t in zip(("out", "mean", "lse"), found, results, strict=True):
            largest = t.detach().abs().clamp(min=far)
            assert_close_to_truth(x, t.detach(), magnitude=largest, name=f"{name} {backend.name}")
        back = backend.backward(*(g.to(backend.device) for g in grads), *given[:3], *found[1:], given[3], window=0)
        for name, x, t, y in zip(("q", "k", "v", "bias"), back, gradients, yardsticks, strict=True):
            assert_close_to_truth(x, t, y, magnitude=magnitudes[name], name=f"{name} {backend.name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "of_keys, of_bias", [(300, None), (-300, None), (40, None), (300, 0), (0, -300), (-150, 400), (1000, -1000)]
)
def test_logarithms_in_the_hundreds(of_keys, of_bias, dtype):
    """Keys and biases far from zero: outputs and gradients of every backend. Where they cancel, or where there is no
    bias, PyTorch loses nothing."""
    sample = _sample(
        f"far {of_keys} {of_bias}", 2, 19, 21, 17, bias=of_bias is not None,
        values=lambda k, w: (k + of_keys, None if w is None else w + of_bias),
    )  # fmt: skip
    args, kwargs = sample.build(dtype)
    oracle = oracle_of(SPEC, args, kwargs, functools.partial(random_output_grads, SPEC, sample, dtype))
    for backend in backends("aft"):
        given = [None if t is None else t.to(backend.device) for t in args]
        results = backend.forward(*given, **kwargs)
        oracle.check_outputs(results)
        grads = [g.to(backend.device) for g in oracle.output_grads]
        bargs, bkwargs = SPEC.backward_call(given, kwargs, results, grads)
        oracle.check_gradients(SPEC.split_gradients(backend.backward(*bargs, **bkwargs), args, kwargs))


def test_keys_and_pairs_that_do_not_count():
    """-inf in a key or in the bias is the same as no such token or pair."""
    q, k, v, w = (t.float() for t in _inputs(M=9))
    expected = effvit.aft(q, k[:, 1:], v[:, 1:], w[:, 1:])
    for place in ("key", "bias"):
        masked_k, masked_w = k.clone(), w.clone()
        (masked_k[:, 0] if place == "key" else masked_w[:, 0]).fill_(float("-inf"))
        for backend in backends("aft"):
            given = [t.to(backend.device) for t in (q, masked_k, v, masked_w)]
            out, mean, lse = backend.forward(*given, window=0)
            torch.testing.assert_close(out.cpu(), expected)
            back = backend.backward(torch.ones_like(out), None, None, *given[:3], mean, lse, given[3], window=0)
            assert all(t.isfinite().all() for t in back), backend.name
            assert not back[1][:, 0].any() and not back[2][:, 0].any() and not back[3][:, 0].any()


def test_nan_stays_visible():
    q, k, v, w = (t.float() for t in _inputs(B=3))
    k[1, 2, 3] = float("nan")
    for bias in (w, None):
        for backend in backends("aft"):
            given = [None if t is None else t.to(backend.device) for t in (q, k, v, bias)]
            out = backend.forward(*given, window=0)[0].cpu()
            assert out[1, :, 3].isnan().all(), backend.name
            out[1, :, 3] = 0
            assert out.isfinite().all(), backend.name
