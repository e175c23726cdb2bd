"""int8_attention: the shared suite, an oracle in NumPy, distance from attention in float64, ends of the range."""

import math

import int_oracle
import pytest
import torch
import torch.nn.functional as F

import effvit
from effvit.reference import int8_attention as definition
from effvit.testing import assert_bitwise_equal, assert_close_to_truth, backends
from effvit.testing.int8_attention import NAMES, SHIFTMAX, SPEC, quantised
from op_suite import ForwardSuite

COMPILED = [b for b in backends("int8_attention") if not b.slow]
REAL = [b for b in COMPILED[1:] if "emulated" not in b.name]


def numpy(t):
    return None if t is None else (t if t.dtype == torch.int8 else t.float()).numpy()


def oracle(args, kwargs):
    """The NumPy oracle of a call of the operator."""
    options = {"scale": None, "causal": False, "smooth_k": True, "exponential": 0} | kwargs
    natural = options.pop("exponential") == SHIFTMAX
    return map(torch.from_numpy, int_oracle.int8_attention(*map(numpy, args), *options.values(), natural))


class TestInt8Attention(ForwardSuite):
    spec = SPEC

    def test_backward_of_one_output(self, framework_sample, native):
        """Gradients go straight through the roundings: those of float attention."""
        args, kwargs = framework_sample.build()
        leaves = [t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in args]
        inputs = [t for t in leaves if t is not None and t.requires_grad]
        for used in range(2):
            with native.selected():
                result = torch.ops.effvit.int8_attention(*leaves, **kwargs)[used]
            g = torch.randn_like(result)
            found = torch.autograd.grad(result, inputs, g, materialize_grads=True)
            exact = definition.float_attention(*leaves, **kwargs)[used]
            for x, e in zip(found, torch.autograd.grad(exact, inputs, g, materialize_grads=True), strict=True):
                torch.testing.assert_close(x, e)

    @pytest.mark.parametrize("backend", [COMPILED[0], *REAL[-1:]], ids=str)
    def test_every_sample_is_the_oracles(self, backend):
        """The oracle shares no code with the definition: its integers are those of every backend."""
        for sample in self.spec.samples:
            if {"empty", "huge"} & sample.tags:
                continue
            for dtype in sample.dtypes[: 3 if backend is COMPILED[0] else 1]:
                args, kwargs = sample.build(dtype)
                magnitudes, _ = self.spec.magnitudes([None if t is None else t.double() if t.is_floating_point() else t
                                                      for t in args], kwargs, None, 0.0)  # fmt: skip
                for name, result, truth in zip(("out", "lse"), backend.forward(*args, **kwargs), oracle(args, kwargs),
                                               strict=True):  # fmt: skip
                    yardstick = truth.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
                    eps = 8 * torch.finfo(result.dtype).eps  # sums of blocks, each rounded
                    assert_close_to_truth(
                        result, truth, yardstick, magnitude=magnitudes[name], eps=eps, name=f"{name} of {sample.name}"
                    )


# ---- the exponentials ------------------------------------------------------------------------------------------------


def test_weights_are_the_oracles():
    t = torch.arange(65536)
    exact = 127 * torch.exp2(-t / 8192.0)
    p = definition.exp2_steps(t)
    assert torch.equal(p, torch.from_numpy(int_oracle.exp2_weights(t.numpy())))
    assert p[0] == 127 and p[-1] == 0 and (p.diff() <= 0).all() and (p - exact).abs().max() < 0.52
    t = t[: definition.LIMIT[SHIFTMAX] + 1]
    p = definition.shiftmax_steps(t)
    assert torch.equal(p, torch.from_numpy(int_oracle.shiftmax_weights(t.numpy())))
    assert p[0] == 127 and p[-1] == 0 and (p.diff() <= 0).all()
    assert (p - 127 * torch.exp(-t / 8192.0)).abs().max() < 6.5


@pytest.mark.parametrize("backend", COMPILED[1:], ids=str)
@pytest.mark.parametrize("exponential", NAMES)
def test_every_weight(backend, exponential):
    """Each of the steps below the maximum, on lanes and on rows: scores are numbers of one channel, values pick one."""
    index, limit = NAMES.index(exponential), definition.LIMIT[NAMES.index(exponential)]
    step = 1.0 if index == 0 else definition.LN2
    for queries in (1, 20):
        t = torch.arange(0, limit + 1, 131 if queries == 1 else 13)
        n = len(t)
        bias = torch.stack((torch.zeros(n), -t / 8192 / step * definition.LN2), -1)[:, None, None]
        q, v = torch.ones(n, queries, 1, 1), torch.eye(2).view(1, 2, 1, 2).expand(n, 2, 1, 2)
        args = (q, torch.zeros(n, 2, 1, 1), v, None, None, None, bias.expand(n, 1, queries, 2))
        result = backend.forward(*args, exponential=index)
        for x, e in zip(result, SPEC.declared.reference(*args, exponential=index), strict=True):
            torch.testing.assert_close(x, e, rtol=4e-7, atol=1e-6)  # a weight off by one: 4e-3


# ---- accuracy --------------------------------------------------------------------------------------------------------


def image_tokens(tokens, heads, head_dim):
    """q, k, v of a random ViT layer on patches of a photograph, in the order of the image."""
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1).float()[None]
    patches = F.unfold(F.interpolate(image, (224, 224)), 16, stride=16)[0].mT[:tokens]
    x = F.layer_norm(patches, patches.shape[-1:])
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3 * heads * head_dim, x.shape[-1], generator=generator) * 2 * x.shape[-1] ** -0.5
    return (x @ w.mT).view(1, len(x), 3, heads, head_dim).unbind(2)


def inputs(kind, n=256):
    if kind == "image":
        return image_tokens(196, 6, 64)
    q, k, v = torch.randn(3, 2, n, 4, 64).unbind(0)
    if kind == "outlier channel":
        q[..., 5] *= 0.2
        k[..., 5] *= 5
    if kind == "offset channels":
        k = k + 6 * torch.randn(2, 1, 4, 64)
    if kind == "outlier values":
        v[..., 3] *= 30
    return q, k, v


def errors(result, truth):
    """(cosine similarity, relative L1)"""
    a, b = result.double().flatten(), truth.flatten()
    return float(F.cosine_similarity(a, b, dim=0)), float((a - b).abs().sum() / b.abs().sum())


def float64(q, k, v):
    return definition.float_attention(q.double(), k.double(), v.double(), scale=q.shape[-1] ** -0.5, causal=False)[0]


# The relative L1 measured is 0.016 to 0.031 with exp2, most of it from weights of 7 bits; on normal numbers 0.032 with
# shiftmax.
@pytest.mark.parametrize("kind", ["random", "outlier channel", "offset channels", "outlier values", "image"])
@pytest.mark.parametrize("backend", REAL[-1:] or COMPILED[:1], ids=str)
def test_close_to_attention(kind, backend):
    q, k, v = inputs(kind)
    for exponential, cosine, l1 in ((0, 0.999, 0.04), (SHIFTMAX, 0.999, 0.05)):
        out, _ = backend.forward(q, k, v, exponential=exponential)
        found = errors(out, float64(q, k, v))
        assert found[0] > cosine and found[1] < l1, (kind, found)


def test_smoothing_matters():
    """Channels of keys that are far from 0 on average: what is left for the differences is a few steps without."""
    q, k, v = inputs("random")
    k = k + 60 * torch.randn(1, 1, 1, 64).sign() * (torch.arange(64) % 8 == 0)
    truth = float64(q, k, v)
    smooth, rough = (errors(effvit.int8_attention(q, k, v, smooth_k=s), truth) for s in (True, False))
    assert smooth[0] > 0.999 and smooth[1] < 0.03 and rough[1] > 4 * smooth[1]


def test_a_mean_changes_no_softmax():
    """Whatever is taken off the keys, lse has it again."""
    q, k, v = inputs("random", 70)
    expected = definition.float_attention(q.double(), k.double(), v.double(), scale=0.125, causal=False)
    for mean in (None, torch.zeros(2, 4, 64), 0.3 * torch.randn(2, 4, 64)):
        out, lse = effvit.int8_attention(q, k, v, k_mean=mean, return_lse=True)
        assert errors(out, expected[0])[0] > 0.999 and (lse - expected[1]).abs().max() < 0.1


# ---- ends of the range -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", COMPILED, ids=str)
def test_integers_with_scales_are_the_floats(backend):
    """A cache holds what a call with floats makes: the same bits, in lanes and in rows."""
    for L, E in ((1, 1), (1, 2), (3, 1), (5, 2), (40, 1)):
        q, k, v = torch.randn(2, L, 2 * E, 24), torch.randn(2, 130, 2, 24) + 1, torch.randn(2, 130, 2, 40)
        expected = backend.forward(q, k, v)
        for name, x, e in zip(("out", "lse"), backend.forward(q, *quantised(k, v)), expected, strict=True):
            assert_bitwise_equal(x, e, name=f"{name} of {L} queries")


@pytest.mark.parametrize("backend", COMPILED, ids=str)
@pytest.mark.parametrize("queries", [2, 9])
def test_queries_that_see_nothing(backend, queries):
    """Zeros, and a lse of -inf; others are as without them."""
    q, k, v = torch.randn(1, queries, 1, 16), torch.randn(1, 70, 1, 16), torch.randn(1, 70, 1, 8)
    bias = torch.randn(1, 1, queries, 70)
    expected = backend.forward(q, k, v, None, None, None, bias)
    bias[:, :, 1] = -math.inf
    out, lse = backend.forward(q, k, v, None, None, None, bias)
    assert (out[:, 1] == 0).all() and (lse[..., 1] == -math.inf).all()
    assert_bitwise_equal(out[:, :1], expected[0][:, :1])
    bias = torch.zeros(1, 1, queries, 70)
    bias[..., :64] = -math.inf  # a block that nobody sees
    masked, _ = backend.forward(q, k, v, None, None, None, bias)
    kept = definition.float_attention(*(t.double() for t in (q, k[:, 64:], v[:, 64:])), scale=0.25, causal=False)[0]
    assert errors(masked, kept)[0] > 0.999
    k, v = k[:, :1], v[:, :1]
    out, lse = backend.forward(q, k, v, causal=True)
    assert (out[:, :-1] == 0).all() and (lse[..., :-1] == -math.inf).all() and torch.isfinite(lse[..., -1]).all()


@pytest.mark.parametrize("backend", COMPILED, ids=str)
@pytest.mark.parametrize("queries", [2, 9])
def test_what_is_not_finite_stays_visible(backend, queries):
    q, k, v = torch.randn(1, queries, 2, 16), torch.randn(1, 70, 2, 16), torch.randn(1, 70, 2, 8)
    for bad in (math.nan, math.inf):
        for with_bias in (False, True):
            bias = torch.zeros(1, 2, queries, 70) if with_bias else None
            x = q.clone()
            x[0, 1, 0, 3] = bad
            out, lse = backend.forward(x, k, v, None, None, None, bias)
            wrong = ~torch.isfinite(out).all(-1)[0]  # [L, H]
            assert wrong[1, 0] and wrong.sum() == 1 and not torch.isfinite(lse[0, 0, 1])
            x = k.clone()
            x[0, 66, 1, 3] = bad
            out, lse = backend.forward(q, x, v, None, None, None, bias)
            assert not torch.isfinite(out[:, :, 1]).any() and torch.isfinite(out[:, :, 0]).all()
            x = v.clone()
            x[0, 5, 0, 2] = bad
            out, lse = backend.forward(q, k, x, None, None, None, bias)
            assert not torch.isfinite(out[:, :, 0, 2]).any() and torch.isfinite(out).sum() == out.numel() - queries
            assert torch.isfinite(lse).all()
    for key in (3, 40, 66, 69):  # in a bias a NaN is a masked key's, maybe
        bias = torch.zeros(1, 2, queries, 70)
        bias[0, 1, 1, key] = math.nan
        out, lse = backend.forward(q, k, v, None, None, None, bias)
        wrong = ~torch.isfinite(out).any(-1)[0]
        assert wrong[1, 1] and wrong.sum() == 1 and torch.isnan(lse[0, 1, 1])


@pytest.mark.parametrize("backend", COMPILED, ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_largest_sums(backend, queries):
    """All integers at their ends: 256 channels of 127 * 127, weights of 127, and -128, which only a cache can hold."""
    sign = torch.tensor([1.0, -1.0])[torch.arange(70) % 2].view(1, 70, 1, 1)
    for k, v in ((sign.expand(1, 70, 1, 256), sign.expand(1, 70, 1, 256)), (-sign.expand(1, 70, 1, 256), sign)):
        args = (torch.ones(1, queries, 1, 256), k.contiguous(), v.contiguous())
        for result, e in zip(backend.forward(*args, smooth_k=False), SPEC.declared.reference(*args, smooth_k=False),
                             strict=True):  # fmt: skip
            assert torch.allclose(result, e, rtol=1e-6)
    k8 = torch.full((1, 64, 1, 256), -128, dtype=torch.int8)
    scales = torch.full((1, 1, 1), 1e-3), torch.ones(1, 1, 1, 256)
    out, lse = backend.forward(torch.ones(1, queries, 1, 256), k8, k8, *scales)
    assert (out == -128).all() and torch.allclose(lse, torch.tensor(-0.128 * 16 + math.log(64)))


@pytest.mark.parametrize("backend", COMPILED, ids=str)
def test_sizes_of_numbers(backend):
    """Tiny and huge ones: zeros below 2^-100, one key that takes all, scores far beyond what the exponential holds."""
    q, k, v = torch.randn(1, 9, 1, 16), torch.randn(1, 70, 1, 16), torch.randn(1, 70, 1, 8)
    for a, b, c in ((1e-20, 1.0, 1.0), (1.0, 1e-36, 1.0), (1.0, 1.0, 1e-36), (1e-30, 1e-30, 1e30), (1e4, 1e4, 1.0),
                    (1e-15, 1e15, 1e-15), (1e15, 1e18, 1.0)):  # fmt: skip
        args = (a * q, b * k, c * v)
        for x, e in zip(backend.forward(*args), SPEC.declared.reference(*args), strict=True):
            assert torch.isfinite(x).all() and torch.allclose(x, e, rtol=2e-5, atol=0 if c == 1 else 1e-36)


def test_gradients_go_straight_through():
    q, k, v = (t.double() for t in inputs("random", 20))
    bias = torch.randn(1, 4, 20, 20)
    leaves = [t.float().requires_grad_() for t in (q, k, v, bias)]
    q, k, v, bias = leaves
    out = effvit.int8_attention(q, k, v, bias=bias, causal=True)
    g = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, g)
    y = definition.float_attention(q, k, v, bias=bias, scale=0.125, causal=True)[0]
    for x, e in zip(found, torch.autograd.grad(y, leaves, g), strict=True):
        torch.testing.assert_close(x, e)
    with torch.no_grad():
        assert_bitwise_equal(out, effvit.int8_attention(q, k, v, bias=bias, causal=True))
    tangents = [torch.randn_like(t) for t in leaves[:3]]  # forward mode likewise

    def tangent(function):
        return torch.func.jvp(function, tuple(t.detach() for t in leaves[:3]), tuple(tangents))

    with torch.no_grad():
        value, moved = tangent(lambda *a: effvit.int8_attention(*a))
        exact, expected = tangent(lambda *a: definition.float_attention(*a)[0])
    assert_bitwise_equal(value, effvit.int8_attention(*(t.detach() for t in leaves[:3])))
    torch.testing.assert_close(moved, expected)
    assert not torch.equal(value, exact)
