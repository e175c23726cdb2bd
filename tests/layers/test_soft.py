"""effvit.layers.SoftmaxFreeAttention and its normalised variant against SOFT's formula in its naive order.

The gradient of the Newton pseudo-inverse is, as in SOFT's own code, that of an inverse, -V^T G V^T with the V that the
iteration reached; in the published normalised variant, that of every step. The plain formula here uses the same; where
the iteration converges, `torch.linalg.inv` and its own gradient are the truth (`test_where_newton_converges_...`). The
[m, m] kernel and its inverse are float32 in every dtype: bfloat16 has no room for a ridge of 0.01.
"""

import copy
import functools

import pytest
import torch
from layer_suite import DTYPES, check, check_everything_else, check_quantised, quantised, randomise, tokens
from torch import nn
from torch.nn import functional as F

import effvit.layers._ops
from effvit._accuracy import assert_bitwise_equal, assert_close_to_truth
from effvit.layers import SoftmaxFreeAttention, SoftmaxFreeNormAttention
from effvit.layers.soft import SoftmaxFreeNormAttentionKernel, batch_newton_pinv, shared_depthwise_conv

H, W = 7, 9
MODULES = {
    "plain": SoftmaxFreeAttention,
    "normalised": SoftmaxFreeNormAttention,
    "normalised, ridge": functools.partial(SoftmaxFreeNormAttention, inverse="ridge"),
}


class NewtonInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, steps):
        p = a + 0.01 * torch.eye(a.shape[-1], dtype=a.dtype)
        v = 1.8 / a.sum(-1).amax(-1)[..., None, None] ** 2 * p
        for _ in range(steps):
            v = 2 * v - v @ p @ v
        ctx.save_for_backward(v)
        return v

    @staticmethod
    def backward(ctx, g):
        (v,) = ctx.saved_tensors
        return -v.mT @ g @ v.mT, None


def published_inverse(p, steps):
    """The normalised variant's own: one step size for the batch, halved until it is small enough; no ridge."""
    alpha = 2 / p.sum(-1).max() ** 2
    for _ in range(10):
        if (torch.eye(p.shape[-1], dtype=p.dtype) - p @ (alpha * p)).abs().sum(-2).max() <= 1.01:
            break
        alpha = alpha / 2
    v = alpha * p
    for _ in range(steps):
        v = 2 * v - v @ p @ v
    return v


def inverse_of(k):
    """What the kernel module k calls its pseudo-inverse."""
    if isinstance(k, SoftmaxFreeNormAttentionKernel) and k.inverse == "published":
        return published_inverse
    return NewtonInverse.apply


def gaussian(a, b):
    """exp(-|a_i - b_j|^2 / 2): by differences in float64, by the expanded square as SOFT has it elsewhere."""
    if a.dtype == torch.float64:
        distance = (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)
    else:
        distance = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :] - 2 * (a @ b.mT)
    return (-distance.clamp(min=0) / 2).exp()


def another_rounding(sample, dtype):
    """Moves every number by up to half an ulp: what a product summed in another order does to it, and less."""
    g = torch.Generator().manual_seed(sample)
    half = torch.finfo(dtype).eps / 2
    return lambda t: t * (1 + half * (2 * torch.rand(t.shape, generator=g) - 1)).to(t.dtype) if sample else t


def formula(m, x, H=H, W=W, inverse=None, sample=0):
    heads, d, k = m.num_head, m.head_dim, m.attn
    q, v = (w(x).reshape(len(x), -1, heads, d).transpose(1, 2) for w in (m.W_q, m.W_v))
    rounded = another_rounding(sample, x.dtype)
    q = rounded(q / d**0.25)
    cls = v.shape[2] - H * W
    maps = q.transpose(2, 3).flatten(0, 1) if k.ratio == 1 else q.transpose(2, 3).reshape(-1, d, H, W)
    if k.ratio == 1:
        t = k.Qlandmark_op(maps.mT).reshape(len(x), heads, -1, d)
    else:
        t = k.Qlandmark_op(maps).flatten(2).mT.reshape(len(x), heads, -1, d)
    t = rounded(k.Qnorm_act(t))
    if k.ratio == 1:
        out = gaussian(t, t).to(v.dtype) @ v
    else:
        wide = torch.promote_types(t.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            k2 = gaussian(t.to(wide), t.to(wide))
            pinv = inverse_of(k)(k2, k.max_iter) if inverse is None else inverse(k2)
            if isinstance(m, SoftmaxFreeNormAttention):
                degree = torch.diag_embed(k2.sum(-1) ** -0.5)
                pinv = degree @ pinv @ degree
        # The kernel's definition rounds its result only; under autocast its inputs are rounded
        a, b = (x.to(q.dtype).to(torch.promote_types(q.dtype, torch.float32)) for x in (q, t))
        with torch.autocast("cpu", enabled=False):
            k1 = gaussian(a, b).to(q.dtype)
            k1, values = k1.to(wide), k1.mT.to(wide) @ v.to(wide)
            out = (k1 @ (pinv @ values) if sample % 2 else (k1 @ pinv) @ values).to(v.dtype)
    if k.use_conv:
        maps = v[:, :, cls:].reshape(len(x), heads, H, W, d).permute(0, 4, 1, 2, 3).flatten(0, 1)
        local = k.conv(maps).reshape(len(x), d, heads, H * W).permute(0, 2, 3, 1)
        out = out + torch.cat([v[:, :, :cls], local], dim=2)
    return m.ff(out.transpose(1, 2).flatten(2))


class Sample(SoftmaxFreeAttention):
    def forward(self, x, H, W):
        return formula(self, x, H, W, sample=self.sample)


class NormSample(SoftmaxFreeNormAttention):
    forward = Sample.forward


def check_samples(m, plain, x, *, call, **kwargs):
    """`check` with more than one sample of the plain formula's rounding error.

    A few pairs of near tokens dominate kernel and gradients, so that all their errors hang on the rounding of few
    numbers: one sample says little about the next.
    """
    samples = [copy.deepcopy(m) for _ in range(5)]
    for i, other in enumerate(samples):
        other.__class__ = NormSample if isinstance(m, SoftmaxFreeNormAttention) else Sample
        other.sample = i + 1
    check(m, plain, x, call=call, yardsticks=samples, **kwargs)


def call(m, x):
    return m(x, H, W)


def spread_landmarks(m, by=1.0):
    """Landmarks far enough apart that the inverse does not blow rounding errors up past every other source of them."""
    with torch.no_grad():
        m.attn.Qnorm_act[0].weight.add_(by)
    return m


def make(kind="plain", ratio=2, conv=3, heads=2, **factory):
    return MODULES[kind](16, heads, ratio, conv, **factory)


VARIANTS = {
    "odd map": {},
    "one head, wide filter": {"heads": 1, "conv": 9},
    "few landmarks, no convolution": {"ratio": 3, "conv": 0},
    "one landmark": {"ratio": 6, "conv": 5},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("kind", MODULES)
def test_like_the_formula(kind, kwargs, dtype):
    m = spread_landmarks(randomise(make(kind, **kwargs))).to(dtype)
    check_samples(m, formula, tokens(2, H * W, 16, dtype=dtype), call=call)


@pytest.mark.parametrize("kind", MODULES)
def test_eval_is_train(kind):
    m, x = randomise(make(kind)), tokens(2, H * W, 16)
    assert_bitwise_equal(call(m.eval(), x), call(m.train(), x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", [0, 1], ids=["map", "class token"])
def test_ratio_one(cls, dtype):
    m = randomise(make(ratio=1)).to(dtype)
    check_samples(m, formula, tokens(2, H * W + cls, 16, dtype=dtype), call=call)


@pytest.mark.parametrize("size", [(2, 2), (3, 17), (12, 8)], ids=str)
def test_map_sizes(size):
    m, x = spread_landmarks(randomise(make())), tokens(2, size[0] * size[1], 16)
    check_samples(m, lambda m, x: formula(m, x, *size), x, call=lambda m, x: m(x, *size))


@pytest.mark.parametrize("kind", MODULES)
def test_where_newton_converges_the_truth_is_the_inverse(kind):
    """Landmarks far apart: the kernel is near the identity, 20 steps reach its inverse; autograd knows the gradient.

    Not too far for the published step, which turns the identity into 0."""
    m = randomise(make(kind, ratio=3))
    m = spread_landmarks(m, by=1.0 if inverse_of(m.attn) is published_inverse else 3.0)
    inverses = []

    def exact(k2):
        eye = torch.eye(k2.shape[-1], dtype=k2.dtype)
        ridge = 0 if inverse_of(m.attn) is published_inverse else 0.01
        inverses.append((torch.linalg.inv(k2 + ridge * eye), inverse_of(m.attn)(k2, 20)))
        return inverses[-1][0]

    check_samples(m, lambda m, x: formula(m, x, inverse=exact), tokens(2, H * W, 16), call=call)
    inverse, newton = inverses[-1]  # of the truth
    assert inverse.dtype == torch.float64 and inverse.shape[-1] == 6
    torch.testing.assert_close(newton, inverse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MODULES)
def test_autocast(kind):
    check_samples(
        spread_landmarks(randomise(make(kind))), formula, tokens(2, H * W, 16), autocast=torch.bfloat16, call=call
    )


def test_more_landmarks_than_the_operator_takes():
    m, x = spread_landmarks(randomise(make(heads=1))), tokens(1, 34 * 32, 16)  # 17 * 16 = 272 landmarks
    check_samples(m, lambda m, x: formula(m, x, 34, 32), x, call=lambda m, x: m(x, 34, 32))


def shared_filters(x, weight):
    """The layer's convolution by F.conv2d: the filters repeated, one channel after another."""
    return F.conv2d(
        x, weight.repeat_interleave(x.shape[1] // len(weight), 0), padding=weight.shape[-1] // 2, groups=x.shape[1]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size, heads, conv", [((56, 56), 2, 9), ((30, 27), 4, 5), ((14, 14), 10, 3)], ids=str)
def test_filter_gradient_of_a_large_map(size, heads, conv, dtype):
    """The sum over every pixel of the batch: one long float32 sum per channel is not accurate enough at 56x56."""
    k = randomise(SoftmaxFreeAttention(heads * 32, heads, 2, conv).attn).to(dtype)
    v = tokens(8, heads, size[0] * size[1], 32, seed=5, dtype=dtype)
    # The layout of the layer: tokens [B, N, h*d], so that the map is channels last
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    g = tokens(*v.shape, seed=6, dtype=dtype)

    def gradients(v, weight, contiguous, to):
        maps, cotangent = (t.to(to).mT.flatten(1, 2).unflatten(2, size) for t in (v, g))
        maps, cotangent = (t.contiguous() if contiguous else t for t in (maps, cotangent))
        maps, weight = maps.detach().requires_grad_(), weight.detach().to(to).requires_grad_()
        return torch.autograd.grad(shared_filters(maps, weight), weight, cotangent)[0]

    out = k.convolve(v, *size)
    got = torch.autograd.grad(out, k.conv.weight, g)[0]
    truth = gradients(v, k.conv.weight, True, torch.float64)
    yardstick = gradients(v, k.conv.weight, True, torch.float32).to(dtype)
    assert got.dtype == dtype
    # Rows of a filter gradient are sums of terms of one size: the largest of the whole filter is their scale
    magnitude = truth.abs().amax((1, 2, 3), keepdim=True).expand_as(truth)
    assert_close_to_truth(got, truth, yardstick, magnitude=magnitude)


@pytest.mark.parametrize("size", [(1, 1), (3, 17), (8, 8), (12, 9)], ids=str)
@pytest.mark.parametrize("conv", [1, 3, 5, 9])
def test_convolution_of_shared_filters(conv, size):
    """In float64, maps smaller than a filter and such as no number of tiles fills, both layouts."""
    convolve = shared_depthwise_conv
    for layout in (torch.contiguous_format, torch.channels_last):
        x = tokens(2, 6, *size).double().contiguous(memory_format=layout).requires_grad_()
        weight = tokens(3, 1, conv, conv).double().requires_grad_()
        y, expected = convolve(x, weight), shared_filters(x, weight)
        assert torch.equal(y, expected)
        g = tokens(*y.shape, seed=4).double()
        for a, b in zip(*(torch.autograd.grad(z, (x, weight), g) for z in (y, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_convolution_with_one_gradient(frozen):
    x, weight = tokens(2, 4, 5, 6), tokens(2, 1, 3, 3)
    wanted = weight.requires_grad_() if frozen == "x" else x.requires_grad_()
    ours, plain = (f(x, weight).square().sum() for f in (shared_depthwise_conv, shared_filters))
    torch.testing.assert_close(torch.autograd.grad(ours, wanted), torch.autograd.grad(plain, wanted))


MAPPED = {"x": (0, None), "weight": (None, 2), "both": (4, 0)}


@pytest.mark.parametrize("in_dims", MAPPED.values(), ids=MAPPED.keys())
def test_vmap_of_the_convolution(in_dims):
    """Values, gradients of every mapped example, and gradients of the whole: one convolution, no loop."""
    x, weight = tokens(5, 2, 6, 7, 4).double(), tokens(5, 3, 1, 3, 3, seed=2).double()
    x, weight = (t[0] if dim is None else t.movedim(0, dim) for t, dim in zip((x, weight), in_dims, strict=True))

    def loss(convolve, x, weight):
        return convolve(x, weight).sin().sum()

    for transform in (lambda f: f, lambda f: torch.func.grad(functools.partial(loss, f), argnums=(0, 1))):
        ours, plain = (
            torch.vmap(transform(f), in_dims, randomness="error")(x, weight)
            for f in (shared_depthwise_conv, shared_filters)
        )
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    ours, plain = (
        torch.func.grad(lambda *args, f=f: torch.vmap(f, in_dims)(*args).sin().sum(), argnums=(0, 1))(x, weight)
        for f in (shared_depthwise_conv, shared_filters)
    )
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_vmap_is_one_convolution(monkeypatch):
    calls, right = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **kwargs: calls.append(args[0].shape) or right(*args, **kwargs))
    x, weight = tokens(5, 2, 6, 7, 4), tokens(5, 3, 1, 3, 3)
    torch.vmap(shared_depthwise_conv, (0, None))(x, weight[0])
    torch.vmap(shared_depthwise_conv)(x, weight)
    assert [tuple(shape) for shape in calls] == [(10, 6, 7, 4), (2, 30, 7, 4)]


@pytest.mark.parametrize("tangents", [(True, False), (False, True), (True, True)], ids=["x", "weight", "both"])
def test_forward_mode_of_the_convolution(tangents):
    x, weight = tokens(2, 6, 7, 4).double().requires_grad_(), tokens(3, 1, 3, 3, seed=2).double().requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        dual = [
            torch.autograd.forward_ad.make_dual(t, tokens(*t.shape, seed=5).double()) if wanted else t
            for t, wanted in zip((x, weight), tangents, strict=True)
        ]
        ours, plain = (torch.autograd.forward_ad.unpack_dual(f(*dual)) for f in (shared_depthwise_conv, shared_filters))
        assert plain.tangent.any()
        torch.testing.assert_close(ours.tangent, plain.tangent, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(y.tangent.sin().sum(), (x, weight), allow_unused=True) for y in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_every_derivative_of_the_convolution():
    x, weight = (tokens(*shape).double().requires_grad_() for shape in ((2, 4, 4, 3), (2, 1, 3, 3)))
    assert torch.autograd.gradcheck(shared_depthwise_conv, (x, weight), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(shared_depthwise_conv, (x, weight), check_fwd_over_rev=True)


def test_vmap_of_the_layer():
    """Values, and per-sample gradients by autograd outside."""
    m, x = spread_landmarks(randomise(make())), tokens(3, 2, H * W, 16)
    weight = m.attn.conv.weight
    mapped, looped = torch.vmap(lambda x: call(m, x))(x), torch.stack([call(m, t) for t in x])
    torch.testing.assert_close(mapped, looped)
    gradients = [torch.autograd.grad(y.sin().sum(), weight)[0] for y in (mapped, looped)]
    torch.testing.assert_close(*gradients)


def test_gradients_of_an_empty_batch():
    m = make()
    call(m, tokens(0, H * W, 16)).sum().backward()
    assert all((p.grad == 0).all() for p in m.parameters())


@pytest.mark.parametrize("scale", [0.1, 0.01], ids=str)
@pytest.mark.parametrize("kind", ["plain", "normalised, ridge"])
def test_landmarks_close_to_each_other(kind, scale):
    """A Gram matrix near a matrix of ones: condition 1200 by the ridge alone, an inverse of entries up to 70.

    In k(q, t) pinv(k(t, t)) k(t, q) V terms a thousand times larger than the sum cancel. Output and gradient of V are
    measured, as the rule has it, against the sum of the absolute values of those terms; and against eager itself,
    whose inverse (V P) V is hardly off in the direction of ones, which is the only one that survives.
    """
    m = randomise(make(kind, conv=0))
    with torch.no_grad():
        m.attn.Qnorm_act[0].weight.mul_(scale)
    k = m.attn
    q, v, g = (tokens(2, 2, H * W, 8, seed=seed) for seed in (5, 6, 7))

    def absolute_terms(t64, q64, summed):
        k1, k2 = gaussian(q64, t64), gaussian(t64, t64)
        inverse = NewtonInverse.apply(k2, k.max_iter)
        if kind == "normalised, ridge":
            d = k2.sum(-1, keepdim=True).rsqrt()
            inverse = d * inverse * d.mT
        return k1 @ inverse.abs() @ (k1.mT @ summed.abs()), k1 @ inverse @ k1.mT

    with torch.no_grad():
        double = copy.deepcopy(k).double()
        q64 = q.double() / 8**0.25
        t64 = double.landmarks(q64.transpose(1, 2), H, W).transpose(1, 2)
        magnitude, matrix = absolute_terms(t64, q64, v.double())
        magnitude_of_gradient, _ = absolute_terms(t64, q64, g.double())
    assert (magnitude.norm() > 500 * (matrix @ v.double()).norm()).item()
    v.requires_grad_()
    out = k(q, v, H, W)
    assert_close_to_truth(out, matrix @ v.detach().double(), magnitude=magnitude)
    gradient = torch.autograd.grad(out, v, g)[0]
    assert_close_to_truth(gradient, matrix.mT @ g.double(), magnitude=magnitude_of_gradient)
    eager = []
    for sample in range(6):
        rounded = another_rounding(sample, torch.float32)
        with torch.no_grad():
            a = rounded(q / 8**0.25)
            b = rounded(k.landmarks(a.transpose(1, 2), H, W).transpose(1, 2))
            k1, k2 = gaussian(a, b), gaussian(b, b)
            inverse = NewtonInverse.apply(k2, k.max_iter)
            if kind == "normalised, ridge":
                d = k2.sum(-1, keepdim=True).rsqrt()
                inverse = d * inverse * d.mT
            eager.append([x @ (y @ (x.mT @ z)) for x, y, z in ((k1, inverse, v), (k1, inverse.mT, g))])
    assert_close_to_truth(out, matrix @ v.detach().double(), [y for y, _ in eager])
    assert_close_to_truth(gradient, matrix.mT @ g.double(), [y for _, y in eager])


@pytest.mark.parametrize("spread, halvings", [(0.01, 8), (0.6, 7), (1.1, 4), (1.8, 0)], ids=str)
def test_published_inverse(spread, halvings):
    """As the published loop in float64, outputs and gradients, from landmarks that nearly coincide to distinct ones."""
    t = (tokens(2, 3, 12, 8).double() * spread).requires_grad_()
    kernel = gaussian(t, t)
    halved = batch_newton_pinv(kernel, 0) / kernel * kernel.sum(-1).max() ** 2 / 2
    torch.testing.assert_close(halved, torch.full_like(halved, 0.5**halvings))
    ours, theirs = batch_newton_pinv(kernel, 20), published_inverse(gaussian(t, t), 20)
    g = tokens(*theirs.shape, seed=3).double()
    gradients = [torch.autograd.grad(inverse, t, g)[0] for inverse in (ours, theirs)]
    for a, b in ((ours, theirs), gradients):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * b.abs().max().item())


def test_published_inverse_is_scaled_by_the_whole_batch():
    """As published: an image's result depends on the others; with the ridge it does not."""
    x = tokens(2, H * W, 16)
    x[1] *= 0.05
    for kind, depends in (("normalised", True), ("normalised, ridge", False)):
        m = randomise(make(kind))
        assert torch.allclose(call(m, x)[:1], call(m, x[:1])) != depends


def test_published_inverse_of_the_identity_is_zero():
    """Also where rounding has left the diagonal below 1, which 20 steps would make 0.3."""
    kernel = torch.eye(4).expand(2, 3, 4, 4) * (1 - 2**-23)
    assert not batch_newton_pinv(kernel, 20).any() and not published_inverse(kernel.round(), 20).any()


def test_which_inverse():
    kernel = SoftmaxFreeNormAttention(16, 2, 2, 3).attn
    assert kernel.inverse == "published" and "inverse=published" in repr(kernel)
    with pytest.raises(ValueError, match="inverse must be 'published' or 'ridge', got 'exact'"):
        SoftmaxFreeNormAttention(16, 2, 2, 3, inverse="exact")
    with pytest.raises(TypeError, match="inverse"):
        SoftmaxFreeAttention(16, 2, 2, 3, inverse="ridge")


def test_steps(monkeypatch):
    m, x = spread_landmarks(randomise(SoftmaxFreeAttention(16, 2, 2, 3, max_iter=3))), tokens(2, H * W, 16)
    check_samples(m, formula, x, call=call)
    other = copy.deepcopy(m)
    other.attn.max_iter = 20
    assert not torch.allclose(call(other, x), call(m, x))


def test_nothing_larger_than_the_kernel_is_formed(monkeypatch):
    """The order of the products: out of [N, m] and [m, d] only, never [N, N]."""
    shapes = []
    right = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: shapes.append(right(a, b).shape) or right(a, b))
    m = make(ratio=3).double()  # in float64 every product is PyTorch's
    m.attn(tokens(1, 2, H * W, 8).double(), tokens(1, 2, H * W, 8).double(), H, W)
    assert shapes and max(s[-1] * s[-2] for s in shapes) <= H * W * 8


@pytest.mark.parametrize("kind", MODULES)
def test_state_dict_is_the_originals(kind):
    keys = ["W_q.weight", "W_q.bias", "W_v.weight", "W_v.bias", "attn.Qlandmark_op.weight", "attn.Qnorm_act.0.weight"]
    keys += ["attn.Qnorm_act.0.bias", "attn.conv.weight", "ff.weight", "ff.bias"]
    state = MODULES[kind](16, 2, 2, 5, 20, "torch").state_dict()
    assert list(state) == keys
    assert state["attn.Qlandmark_op.weight"].shape == (8, 8, 2, 2) and state["attn.conv.weight"].shape == (2, 1, 5, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_inference(kwargs, dtype):
    """Without gradients the values run channels first."""
    m = spread_landmarks(randomise(make(**kwargs))).to(dtype)
    x = tokens(2, H * W, 16, dtype=dtype)
    with torch.no_grad():
        truth = formula(copy.deepcopy(m).double(), x.double())
        samples = [formula(m, x, sample=i) for i in range(6)]
        y = call(m, x)
        assert y.is_contiguous()
        assert_close_to_truth(y, truth, samples)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close_to_truth(call(m, x), truth, [formula(m, x, sample=i) for i in range(6)])


@pytest.mark.parametrize("where", ["W_v", "ff"])
def test_a_projection_that_is_not_a_plain_linear(where):
    """A hook or an adapter works without gradients too."""
    m, x = randomise(make()), tokens(2, H * W, 16)
    getattr(m, where).register_forward_hook(lambda module, args, out: 2 * out + 1)
    expected = call(m, x)
    with torch.no_grad():
        torch.testing.assert_close(call(m, x), expected)
    setattr(m, where, nn.Sequential(getattr(m, where), nn.Tanh()))
    expected = call(m, x)
    with torch.no_grad():
        torch.testing.assert_close(call(m, x), expected)


def test_no_gradients_under_torch_compile():
    m, x = randomise(make()), tokens(2, H * W, 16)
    with torch.no_grad():
        compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, H, W), call(m, x))


@pytest.mark.parametrize("kind", MODULES)
def test_quantised_projections(kind):
    m = spread_landmarks(randomise(make(kind)))
    check_quantised(m, formula, tokens(2, H * W, 16), last="ff", call=call)


def test_quantised_landmarks():
    """With ratio 1 they are a linear layer in the middle, where a rounding may become a step: compared by parts."""
    m, x = quantised(randomise(make(ratio=1))), tokens(2, H * W, 16)
    with torch.no_grad():
        q, v = (w(x).unflatten(-1, (2, 8)).transpose(1, 2) for w in (m.W_q, m.W_v))
        assert_bitwise_equal(call(m, x), m.ff(m.attn(q, v, H, W).transpose(1, 2).flatten(2)))


def test_layouts_of_q_and_v():
    """Q and V of any strides: the original hands them over as [B, h, N, d], contiguous or transposed."""
    k = randomise(make().attn)
    q, v = tokens(2, 2, H * W, 8), tokens(2, 2, H * W, 8, seed=5)
    expected = k(q, v, H, W)
    transposed = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, v)]
    torch.testing.assert_close(k(*transposed, H, W), expected)
    wide = [torch.stack([t, t], dim=-1)[..., 0] for t in (q, v)]  # last stride 2
    torch.testing.assert_close(k(*wide, H, W), expected)


@pytest.mark.parametrize("kind", MODULES)
def test_the_rest(kind):
    make_one = lambda **factory: make(kind, **factory)
    check_everything_else(randomise(make_one()), make_one, tokens(2, H * W, 16), call)


def test_the_operators_run(monkeypatch):
    """In float32 nothing falls back to the definitions in plain PyTorch."""
    monkeypatch.setattr(effvit.layers._ops.effvit, "reference", nn.Module())
    call(make(), tokens(2, H * W, 16))


@pytest.mark.parametrize("ratio", [1, 4])
def test_sizes_that_do_not_fit(ratio):
    m = SoftmaxFreeAttention(16, 2, ratio, 3)
    with pytest.raises(ValueError, match=r"Q must have H\*W = 63 tokens, got 65"):
        m(tokens(2, 65, 16), 7, 9)
    if ratio > 1:
        with pytest.raises(ValueError, match="H and W must be >= ratio 4, got 3 and 9"):
            m(tokens(2, 27, 16), 3, 9)
    with pytest.raises(ValueError, match="use_conv must be odd, got 4"):
        SoftmaxFreeAttention(16, 2, ratio, 4)
