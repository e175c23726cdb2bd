"""Layers of integer-only training: their integers beside plain NumPy, their gradients beside derivatives in float64."""

import copy
import math

import integer_plain
import numpy as np
import pytest
import torch
from layer_suite import randomise
from torch import nn

from effvit.layers import (
    IntegerBits,
    IntGELU,
    IntLayerNorm,
    IntSoftmax,
    QuantAct,
    QuantAttention,
    QuantBlock,
    QuantConv2d,
    Quantised,
    QuantLinear,
    QuantMatMul,
    QuantMLP,
    QuantPatchMerging,
)

EPS = torch.finfo(torch.float64).eps


def quantised(*shape, bits=8, scale=0.05, seed=0, dtype=torch.float64):
    """Integers on the grid, whose value asks for a gradient."""
    g = torch.Generator().manual_seed(seed)
    top = 2 ** (bits - 1)
    q = torch.randint(-top, top, shape, generator=g).to(torch.int8 if bits <= 8 else torch.int16)
    scale = torch.as_tensor(scale, dtype=torch.float64)
    value = (q.to(dtype) * scale.to(dtype)).requires_grad_()
    return Quantised(value, q, scale)


def array(t):
    return t.detach().double().numpy() if t.is_floating_point() else t.numpy().astype(np.int64)


def gradients(module, x, *others):
    """(output, {name: gradient}) for a fixed cotangent g."""
    y = module(x, *others)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (y.value * g).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return y, g, {"x": x.value.grad} | found


def same(found, expected):
    """Float64 on both sides: rounding only."""
    bound = 64 * EPS * max(float(expected.abs().max()), 1e-300)
    assert found.shape == expected.shape and float((found - expected).abs().max()) <= bound


# ---- integers --------------------------------------------------------------------------------------------------------


def test_linear_is_ivits():
    linear = randomise(QuantLinear(24, 17)).double()
    x = quantised(3, 5, 24)
    y = linear(x)
    expected, scale = integer_plain.linear(array(x.integers), 0.05, array(linear.weight), array(linear.bias))
    assert np.array_equal(array(y.integers), expected) and np.array_equal(array(y.scale), scale)
    assert y.integers.dtype == torch.int32
    assert torch.equal(y.value, y.integers * y.scale)


def test_patch_convolution_is_a_linear_layer_of_patches():
    conv = randomise(QuantConv2d(3, 8, 4)).double()
    x = quantised(2, 3, 8, 12)
    y = conv(x)
    assert y.shape == (2, 2, 3, 8)
    weight = (conv.integers(x.scale)[0] * conv.weight_scale(x.scale)[:, None]).view_as(conv.weight)
    exact = nn.functional.conv2d(x.value.detach(), weight, conv.bias, stride=4).permute(0, 2, 3, 1)
    assert float((y.value - exact).detach().abs().max()) < float(y.scale.max())  # but for the bias, rounded to a step
    with pytest.raises(ValueError, match="QuantConv2d: x must be whole patches"):
        conv(quantised(2, 3, 9, 12))


@pytest.mark.parametrize("bits, transpose", [(8, True), (9, False), (16, False), (8, False)])
def test_matmul_is_exact(bits, transpose):
    a, b = quantised(2, 3, 5, 7, bits=bits), quantised(2, 3, *((6, 7) if transpose else (7, 6)), scale=0.1, seed=1)
    y = QuantMatMul(transpose)(a, b)
    other = array(b.integers)
    expected = array(a.integers) @ (other.swapaxes(-1, -2) if transpose else other)
    assert np.array_equal(array(y.integers), expected) and float(y.scale) == 0.05 * 0.1


@pytest.mark.parametrize("bits", [6, 8, 9, 16])
@pytest.mark.parametrize("n, scale", [(15, 0.05), (10, 0.004), (30, 0.0001)])
def test_softmax_is_shiftmax(bits, n, scale):
    layer, x = IntSoftmax(bits, n), quantised(2, 9, 33, bits=16 if scale < 0.01 else 8, scale=scale)
    y = layer(x)
    largest = max(k for k in range(4, 31) if math.ceil(1 / scale) << k <= 2**31 - 1)
    expected, step = integer_plain.softmax(array(x.integers), scale, min(n, largest), bits)
    assert np.array_equal(array(y.integers), expected) and float(y.scale) == step


@pytest.mark.parametrize("bits", [8, 16])
def test_gelu_is_shift_gelu(bits):
    x = quantised(4, 40, scale=0.03)
    y = IntGELU(bits, 20)(x)
    expected, step = integer_plain.gelu(array(x.integers), 0.03, 20, bits)
    assert np.array_equal(array(y.integers), expected) and float(y.scale) == step


def test_layer_norm_is_ivits():
    norm, x = randomise(IntLayerNorm(48)).double(), quantised(5, 48, bits=16, scale=1e-3)
    y = norm(x)
    expected, scale = integer_plain.layer_norm(array(x.integers), array(norm.weight), array(norm.bias))
    assert np.array_equal(array(y.integers), expected) and np.array_equal(array(y.scale), scale)


@pytest.mark.parametrize("bits", [6, 8, 16])
@pytest.mark.parametrize("groups", [1, 3])
def test_act_requantises(bits, groups):
    act = QuantAct(bits, groups).eval()
    act.low.copy_(torch.tensor([-3.0, -1.0, -5.0][:groups]))
    act.high.copy_(torch.tensor([2.0, 4.0, 1.0][:groups]))
    x, residual = quantised(4, 12, bits=16, scale=1e-3), quantised(4, 12, scale=0.02, seed=2)
    x.scale = torch.rand(12, dtype=torch.float64) * 1e-3 + 1e-4
    scales = [integer_plain.scale_of(float(a), float(b), bits) for a, b in zip(act.low, act.high, strict=True)]
    assert act.scale.tolist() == scales
    out = np.repeat(scales, 12 // groups)
    for other in (None, residual):
        rest = () if other is None else (array(other.integers), 0.02)
        expected = integer_plain.requantised(array(x.integers), array(x.scale), out, bits, *rest)
        assert np.array_equal(array(act(x, other).integers), expected)
    floats = torch.randn(4, 12)
    expected = np.clip(np.rint(array(floats) / out), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert np.array_equal(array(act(floats).integers), expected)


def calibrated(module, x, residual=None):
    """Ranges as one pass in training finds them."""
    module.train()
    with torch.no_grad():
        module(x)
    return module.eval()


@pytest.mark.parametrize("scores, softmax, gelu", [(8, 8, 8), (16, 16, 8), (12, 9, 16)])
def test_a_block_is_ivits(scores, softmax, gelu):
    """Every integer of a transformer block beside the plain NumPy version; the deployed block as well."""
    torch.manual_seed(3)
    bits = IntegerBits(scores=scores, softmax=softmax, gelu=gelu)
    qkv, proj, fc1, fc2 = (nn.Linear(*s) for s in ((24, 72), (24, 24), (24, 50), (50, 24)))
    norms = [randomise(IntLayerNorm(24), seed) for seed in (1, 2)]
    module = QuantBlock(
        norms[0], QuantAttention(qkv, proj, 3, 8, bits), norms[1], QuantMLP(fc1, fc2, bits), bits
    )  # fmt: skip
    x = quantised(2, 11, 24, bits=16, scale=1e-4, dtype=torch.float32)
    calibrated(module, x)
    y = module(x)
    a, m = module.attn, module.mlp
    acts = {
        "norm1": module.norm1_act, "attn_residual": module.attn_residual, "norm2": module.norm2_act, "fc1": m.fc1_act,
        "mlp_residual": module.mlp_residual, "scores": a.scores_act, "context": a.context_act, "act": m.act_act,
    }  # fmt: skip
    scales = {k: integer_plain.scale_of(float(v.low), float(v.high), v.bits) for k, v in acts.items()}
    scales["qkv"] = [
        integer_plain.scale_of(float(low), float(high), 8)
        for low, high in zip(a.qkv_act.low, a.qkv_act.high, strict=True)
    ]
    parameters = {k: array(v) for k, v in module.named_parameters()}
    n = [layer.options(act.scale[0])["n"] for layer, act in ((a.softmax, a.scores_act), (m.act, m.fc1_act))]
    expected = integer_plain.block(
        array(x.integers), 1e-4, parameters, scales, 3, {"scores": scores, "softmax": softmax, "gelu": gelu}, n
    )
    assert np.array_equal(array(y.integers), expected)
    assert y.integers.dtype == torch.int16 and len(y.integers.unique()) > 100
    deployed, scale = module.deployed(x.scale)
    assert torch.equal(deployed(x.integers), y.integers) and torch.equal(scale, y.scale)


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_gradient_of_linear():
    linear, x = randomise(QuantLinear(24, 17)).double(), quantised(3, 5, 24)
    y, g, found = gradients(linear, x)
    q, _, scale = linear.integers(x.scale)
    same(found["x"], g @ (q * (scale / x.scale)[:, None]))
    same(found["weight"], torch.einsum("abn,abk->nk", g, x.value.detach()))
    same(found["bias"], g.sum((0, 1)))


def test_gradient_of_patch_convolution():
    conv, x = randomise(QuantConv2d(3, 8, 4)).double(), quantised(2, 3, 8, 12)
    y, g, found = gradients(conv, x)
    q, _, scale = conv.integers(x.scale)
    wide = x.value.detach().clone().requires_grad_()
    grid = (q * (scale / x.scale)[:, None]).view_as(conv.weight).detach().requires_grad_()
    (nn.functional.conv2d(wide, grid, stride=4).permute(0, 2, 3, 1) * g).sum().backward()
    same(found["x"], wide.grad)
    same(found["weight"], grid.grad)
    same(found["bias"], g.sum((0, 1, 2)))


@pytest.mark.parametrize("transpose", [True, False])
def test_gradient_of_matmul(transpose):
    a, b = quantised(2, 5, 7), quantised(2, *((6, 7) if transpose else (7, 6)), scale=0.1, seed=1)
    _, g, found = gradients(QuantMatMul(transpose), a, b)
    other = b.value.detach()
    same(found["x"], g @ (other if transpose else other.mT))
    expected = a.value.detach().mT @ g
    same(b.value.grad, expected.mT if transpose else expected)


def test_gradient_of_softmax():
    x = quantised(3, 20, scale=0.05)
    _, g, found = gradients(IntSoftmax(16), x)
    e = (x.value.detach() - x.value.detach().amax(-1, keepdim=True)).exp()
    p = e / e.sum(-1, keepdim=True)
    same(found["x"], p * (g - (g * p).sum(-1, keepdim=True)))


def test_gradient_of_gelu():
    x = quantised(3, 20, scale=0.04)
    _, g, found = gradients(IntGELU(8), x)
    v = x.value.detach()
    s = 1 / (1 + (-1.702 * v).exp())
    same(found["x"], g * (s + 1.702 * v * s * (1 - s)))


def test_gradient_of_layer_norm():
    norm, x = randomise(IntLayerNorm(16, eps=0.0)).double(), quantised(4, 16, bits=16, scale=1e-3)
    _, g, found = gradients(norm, x)
    v, w = x.value.detach(), norm.weight.detach()
    deviation = ((v - v.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True).sqrt()
    y, h = (v - v.mean(-1, keepdim=True)) / deviation, g * w
    same(found["x"], (h - h.mean(-1, keepdim=True) - y * (h * y).mean(-1, keepdim=True)) / deviation)
    same(found["weight"], (g * y).sum(0))
    same(found["bias"], g.sum(0))


def test_gradient_of_act_is_a_clamps():
    act = QuantAct(8).eval()
    act.low.fill_(-1.0)
    act.high.fill_(2.0)
    x, residual = quantised(6, 30, bits=16, scale=1e-4), quantised(6, 30, scale=0.01, seed=3)
    y, g, found = gradients(act, x, residual)
    total, step = (x.value + residual.value).detach(), 2 / 127
    inside = (total >= -128.5 * step) & (total <= 127.5 * step)
    assert 0.5 < float(inside.double().mean()) < 0.99
    same(found["x"], g * inside)
    same(residual.value.grad, g * inside)
    assert torch.equal(y.value, y.integers * y.scale)


def test_gradient_of_a_parameter_in_the_residual():
    act = QuantAct(16)
    position = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    x = quantised(3, 5, 8, scale=0.01)
    _, g, found = gradients(act, x, position)
    same(found["x"], g)
    same(position.grad, g.sum(0, keepdim=True))


def test_gradient_of_layer_scale_and_bias():
    attn = QuantAttention(
        nn.Linear(8, 24), nn.Linear(8, 8), 2, 4, IntegerBits(), window=(2, 2), table=torch.randn(9, 2),
        index=torch.arange(16).view(4, 4) % 9,
    ).double()  # fmt: skip
    x = quantised(3, 2, 4, 4, bits=16, scale=1e-3)
    scores = attn.biased(x)
    g = torch.randn(scores.shape, dtype=torch.float64)
    (scores.value * g).sum().backward()
    same(x.value.grad, g)
    expected = torch.zeros(9, 2, dtype=torch.float64)
    expected.index_add_(0, (torch.arange(16) % 9), g.sum(0).flatten(1).T)
    same(attn.relative_position_bias_table.grad, expected)

    gamma, x = torch.randn(4, dtype=torch.float64, requires_grad=True), quantised(3, 4, scale=0.01)
    scaled = x.scaled(gamma)
    assert torch.equal(scaled.integers, x.integers) and torch.equal(scaled.scale, 0.01 * gamma.detach())
    g = torch.randn(3, 4, dtype=torch.float64)
    (scaled.value * g).sum().backward()
    same(gamma.grad, (g * x.value.detach()).sum(0))
    same(x.value.grad, g * gamma.detach())


# ---- ranges ----------------------------------------------------------------------------------------------------------


def test_observers_average_in_training_alone():
    act, batches = QuantAct(8), [torch.randn(4, 6) * s for s in (1.0, 3.0, 0.5)]
    with pytest.raises(RuntimeError, match="QuantAct: has seen no data"):
        act.eval()(batches[0])
    act.train()
    low = high = None
    for x in batches:
        act(x)
        low = float(x.min()) if low is None else 0.95 * low + 0.05 * float(x.min())
        high = float(x.max()) if high is None else 0.95 * high + 0.05 * float(x.max())
    assert float(act.low) == pytest.approx(low, rel=1e-6) and float(act.high) == pytest.approx(high, rel=1e-6)
    before = copy.deepcopy(act.state_dict())
    act.eval()(torch.full((1, 6), 100.0))
    act.train().observing = False
    act(torch.full((1, 6), 100.0))
    assert all(torch.equal(v, before[k]) for k, v in act.state_dict().items())
    other = QuantAct(8)
    other.load_state_dict(before)
    assert torch.equal(other.scale, act.scale)


def test_a_calibration_sees_everything_and_forgets_what_was_before():
    act = QuantAct(8)
    act(torch.full((1, 6), 50.0))
    act.calibrate()
    batches = [torch.randn(40, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    act.quantising = False
    for x in batches:
        assert act(x).integers is None
    act.calibrated()
    assert float(act.low) == float(torch.stack(batches).min()) and float(act.high) == float(torch.stack(batches).max())


@pytest.mark.parametrize("percent", [90.0, 99.0, 100.0])
def test_percentile(percent):
    act = QuantAct(8, groups=2)
    act.calibrate("percentile")
    act.quantising = False
    x = torch.cat([torch.randn(500, 4) * s for s in (0.1, 1.0, 4.0)])
    x[:, 2:] *= 7
    for batch in x.split(100):
        act(batch)
    act.calibrated("percentile", percent)
    for group, columns in enumerate((x[:, :2], x[:, 2:])):
        expected = np.percentile(columns.abs().numpy(), percent)
        most = max(abs(float(act.low[group])), abs(float(act.high[group])))
        assert most == pytest.approx(expected, rel=0.01)


def test_least_squared_error_beats_the_maximum():
    x = torch.randn(4000, 4, generator=torch.Generator().manual_seed(1)) ** 3  # long tails

    def error(method, bits):
        act = QuantAct(bits)
        act.calibrate(method)
        act.quantising = False
        act(x)
        act.calibrated(method)
        act.quantising = True
        return float((act.eval()(x).value - x).square().mean())

    assert error("mse", 4) < 0.5 * error("max", 4)
    assert error("mse", 16) == error("max", 16)


def test_values_of_zero_and_channels_of_zero():
    """A layer that never sees anything but 0, a channel whose weights are 0: nothing is divided by 0."""
    act = QuantAct(8).train()
    assert not act(torch.zeros(2, 3)).integers.any()
    linear = QuantLinear(6, 4)
    with torch.no_grad():
        linear.weight[1:3] = 0
        linear.bias.copy_(torch.tensor([0.3, 0.7, 0.0, -0.2]))
    x = quantised(5, 6, dtype=torch.float32)
    y = linear(x)
    torch.testing.assert_close(y.value[:, 1:3], torch.tensor([0.7, 0.0]).expand(5, 2))
    out = QuantAct(8).train()(y)
    assert float((out.value - y.value).detach().abs().max()) <= float(out.scale) / 2 * 1.0001
    norm = IntLayerNorm(6)
    with torch.no_grad():
        norm.weight[2] = 0
    value = QuantAct(8).train()(norm(quantised(5, 6, bits=16, dtype=torch.float32))).value
    assert not value[:, 2].any() and torch.isfinite(value).all()


@pytest.mark.parametrize("kind", [IntSoftmax, IntGELU])
@pytest.mark.parametrize("scale", [0.2, 0.01, 0.0005])
def test_the_best_n(kind, scale):
    """The n that is chosen has the least error of all, by the plain formulas."""
    layer, rows = kind(bits=8), torch.randn(20, 64, generator=torch.Generator().manual_seed(2)) * 3
    layer.samples = []
    layer(Quantised(rows))
    layer.choose_n(torch.tensor(scale, dtype=torch.float64))
    q = np.rint(array(rows) / scale).astype(np.int64)
    value = q * scale
    factor = 1 if kind is IntSoftmax else 1.702
    if kind is IntSoftmax:
        e = np.exp(value - value.max(-1, keepdims=True))
        exact = e / e.sum(-1, keepdims=True)
    else:
        exact = value / (1 + np.exp(-1.702 * value))
    function = integer_plain.softmax if kind is IntSoftmax else integer_plain.gelu
    errors = {}
    for n in range(4, 31):
        if -math.floor(-1 / (factor * scale)) << n <= 2**31 - 1:
            y, step = function(q, scale, n, 8)
            errors[n] = ((y * step - exact) ** 2).sum()
    assert errors[int(layer.n)] <= min(errors.values()) * (1 + 1e-9)
    assert errors[int(layer.n)] < errors[max(errors)] or int(layer.n) == max(errors)
    other = kind(bits=8)
    other.load_state_dict(layer.state_dict())
    assert int(other.n) == int(layer.n)


@pytest.mark.parametrize("kind", [IntSoftmax, IntGELU])
def test_the_first_batch_in_training_chooses_n(kind):
    """What a calibration on it chooses; not in evaluation, not without rows, and not where n is given."""
    x, usual = quantised(20, 64, bits=16, scale=1e-3), kind(8).usual_n
    layer, calibrated, given = kind(8), kind(8), kind(8, n=12)
    calibrated.samples = []
    calibrated.sample(x.value)
    calibrated.choose_n(x.scale)
    layer.eval()(x)
    assert layer.options(x.scale)["n"] == min(usual, 21) and int(layer.n) == 0
    layer.train()(quantised(0, 64))
    assert int(layer.n) == 0
    y = layer(x)
    assert int(layer.n) == int(calibrated.n) not in (0, usual) and torch.equal(y.integers, calibrated(x).integers)
    assert layer.samples is None and y.value.requires_grad
    layer(quantised(20, 64, scale=0.1)), given(x)
    assert int(layer.n) == int(calibrated.n) and int(given.n) == 12
    torch._dynamo.reset()
    compiled = kind(8)
    assert torch.equal(torch.compile(compiled, backend="eager")(x).integers, y.integers)
    assert int(compiled.n) == int(layer.n)


@pytest.mark.parametrize("make", [QuantAct, IntSoftmax, IntGELU, lambda b: QuantLinear(6, 4, bits=b),
                                  lambda b: QuantConv2d(3, 4, 2, bits=b)])  # fmt: skip
def test_bits_are_in_the_state_dict(make):
    narrow, wide = make(5), make(8)
    plain = {k: t for k, t in wide.state_dict().items() if "extra" not in k}
    wide.load_state_dict(narrow.state_dict())
    assert wide.bits == 5
    wide.load_state_dict(plain)  # of a float layer, say
    assert wide.bits == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ranges_stay_in_float32(dtype):
    act, batches = QuantAct(8, groups=2).to(dtype), [torch.randn(4, 6, dtype=dtype) * s for s in (1, 2)]
    for x in batches:
        y = act(x)
        assert y.value.dtype == dtype
    act = act.to(dtype)
    assert act.low.dtype == act.high.dtype == torch.float32
    for group, columns in enumerate((slice(3), slice(3, 6))):
        first, last = (float(x[:, columns].max()) for x in batches)
        assert float(act.high[group]) == pytest.approx(0.95 * first + 0.05 * last, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(bad):
    """A batch of training is refused, and forgotten; of a calibration the end says it."""
    act, x = QuantAct(8), torch.randn(4, 6)
    wrong = x.clone()
    wrong[1, 2] = bad
    for _ in range(2):
        with pytest.raises(ValueError, match="QuantAct: x must be finite, got NaN or infinity"):
            act(wrong)
        act(x)
        assert (float(act.low), float(act.high)) == (float(x.min()), float(x.max()))
    for method in ("max", "percentile"):
        act.calibrate(method)
        act.quantising = False
        act(x), act(wrong), act(x)
        expected = "QuantAct: what it has seen must be finite: calibrate again, got"
        with pytest.raises(ValueError, match=expected):
            act.calibrated(method)
        with pytest.raises(ValueError, match=expected):
            act.scale  # noqa: B018


def test_plain_tensors_are_refused():
    x = torch.randn(2, 3, 4, 4)
    layers = [IntSoftmax(), IntGELU(), IntLayerNorm(4), QuantLinear(4, 4), QuantConv2d(3, 4, 2)]
    for layer in layers:
        expected = rf"{type(layer).__name__}: x must be a Quantised \(QuantAct makes them\), got Tensor"
        with pytest.raises(TypeError, match=expected):
            layer(x)
    for a, b, name in ((x, quantised(2, 3, 4, 4), "a"), (quantised(2, 3, 4, 4), x, "b")):
        with pytest.raises(TypeError, match=f"QuantMatMul: {name} must be a Quantised"):
            QuantMatMul()(a, b)
    with pytest.raises(TypeError, match="QuantAct: x must be a Quantised .*, got Tensor"):
        QuantAct()(x, norm=IntLayerNorm(4))
    with pytest.raises(TypeError, match="QuantAct: x must be a Quantised where there is a residual, got a float"):
        QuantAct()(x, quantised(2, 3, 4, 4))
    with pytest.raises(TypeError, match="QuantAct: x must be a Quantised .*, got NoneType"):
        QuantAct()(None)
    linear = nn.Linear(8, 24)
    with pytest.raises(TypeError, match="QuantAttention: x must be a Quantised"):
        QuantAttention(linear, nn.Linear(8, 8), 2, 4, IntegerBits(), window=(2, 2))(torch.randn(1, 4, 4, 8))
    with pytest.raises(TypeError, match="QuantPatchMerging: x must be a Quantised"):
        QuantPatchMerging(IntLayerNorm(32), QuantLinear(32, 16), IntegerBits())(torch.randn(1, 4, 4, 8))


def test_errors():
    with pytest.raises(ValueError, match="QuantAct: bits must be"):
        QuantAct(1)
    with pytest.raises(ValueError, match="IntegerBits: residual must be"):
        IntegerBits(residual=8)
    with pytest.raises(ValueError, match="QuantConv2d: conv must be one of patches"):
        QuantConv2d.from_conv(nn.Conv2d(3, 8, 4, 2))
    with pytest.raises(ValueError, match="QuantLinear: x must be int8 with one scale"):
        QuantLinear(6, 4)(quantised(5, 6, bits=16))
    with pytest.raises(ValueError, match="IntSoftmax: scale must be such that x0 fits"):
        IntSoftmax().options(torch.tensor(1e-10, dtype=torch.float64))
    many = quantised(5, 6, bits=16)
    many.scale = torch.rand(6, dtype=torch.float64)
    for layer in (IntSoftmax(), IntGELU(), IntLayerNorm(6)):
        with pytest.raises(ValueError, match=f"{type(layer).__name__}: x must be of one scale"):
            layer(many)
    with pytest.raises(ValueError, match="QuantMatMul: a and b must be of one scale each"):
        QuantMatMul()(many, many)
