"""Int8Linear, Sparse24Int8Linear, OutlierLinear, QATLinear and Sparse24Linear against plain formulas; round trips."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layer_suite import randomise, tokens
from torch import nn

import effvit
from effvit._accuracy import assert_bitwise_equal, assert_close_to_truth
from effvit.layers import Int8Linear, OutlierLinear, QATLinear, Sparse24Int8Linear, Sparse24Linear

K, N = 36, 22
ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def linear(k=K, n=N, bias=True, seed=0):
    return randomise(nn.Linear(k, n, bias=bias), seed)


# ---- formulas in NumPy, independent of effvit ------------------------------------------------------------------------


def round_to_int8(x, scale=None):
    """(int64, scale) of rows, in float32 as IEEE has it; scale [rows] or absmax / 127."""
    x = x.detach().float().numpy().astype(np.float32)
    if scale is None:
        scale = np.abs(x).max(-1) / np.float32(127)
        scale = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
    steps = np.rint((x / scale[..., None]).astype(np.float32))
    return np.clip(steps, -127, 127).astype(np.int64), scale


def two_of_four(w):
    """The weight with the two largest of every four entries along K, by sorting each four."""
    w = w.detach().clone()
    for row in w:
        for start in range(0, len(row), 4):
            four = row[start : start + 4]
            four[sorted(range(4), key=lambda i: (-abs(float(four[i])), i))[2:]] = 0
    return w


def formula(x, w, bias, activation="none", x_scale=None, extra=None, dtype=torch.float64):
    """act(q_x q_wᵀ s_x s_w + bias + extra) of float x [..., K] and w [N, K], the sums in int64."""
    q_x, s_x = round_to_int8(x, None if x_scale is None else np.full(x.shape[:-1], x_scale, np.float32))
    q_w, s_w = round_to_int8(w)
    acc, s_x, s_w = (torch.from_numpy(np.asarray(t)).to(dtype) for t in (q_x @ q_w.T, s_x, s_w))
    y = acc * (s_x[..., None] * s_w)
    for t in (bias, extra):
        y = y if t is None else y + t.detach().to(dtype)
    return ACTIVATIONS[activation](y)


def check(y, x, w, bias, **options):
    truth = formula(x, w, bias, **options)
    if "extra" in options and options["extra"] is not None:
        options["extra"] = options["extra"].float()
    assert_close_to_truth(y, truth, formula(x, w, bias, **options, dtype=torch.float32).to(y.dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_dynamic(dtype, activation, bias):
    m, x = linear(bias=bias), tokens(2, 5, K, dtype=dtype)
    y = Int8Linear.from_linear(m, activation=activation)(x)
    assert y.dtype == dtype and y.shape == (2, 5, N)
    check(y, x, m.weight, m.bias, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_static(activation):
    """A scale that clips, given as a number or a tensor."""
    m, x, scale = linear(), tokens(7, K), 0.013
    y = Int8Linear.from_linear(m, input_scale=scale, activation=activation)(x)
    assert float(x.abs().max()) > 127 * scale
    check(y, x, m.weight, m.bias, activation=activation, x_scale=scale)
    assert_bitwise_equal(
        Int8Linear.from_linear(m, input_scale=torch.tensor(scale), activation=activation)(x), y
    )  # fmt: skip


def test_sparse24_int8():
    m, x = linear(), tokens(3, 5, K)
    check(Sparse24Int8Linear.from_linear(m, activation="gelu")(x), x, two_of_four(m.weight), m.bias, activation="gelu")
    check(
        Sparse24Int8Linear.from_linear(m, input_scale=0.02)(x), x, two_of_four(m.weight), m.bias, x_scale=0.02
    )  # fmt: skip


@pytest.mark.parametrize("keep_weight", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_outliers(compiled, keep_weight):
    """LLM.int8()'s formula: out = acc * rs * cs + bias + x[:, o] W[:, o]ᵀ, o the columns with an entry >= threshold."""
    m, x = linear(), tokens(2, 6, K)
    x[0, 3, [2, 30]] = torch.tensor([-9.0, 6.0])  # one is just at the threshold
    layer = OutlierLinear.from_linear(m, threshold=6.0, activation="relu", keep_weight=keep_weight)
    y = (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer)(x)
    w = m.weight
    if not keep_weight:
        q, scale = round_to_int8(w)
        w = torch.from_numpy(q) * torch.from_numpy(scale).double()[:, None]
    others = x.clone()
    others[..., [2, 30]] = 0
    extra = x[..., [2, 30]].double() @ w[:, [2, 30]].double().T
    check(y, others, m.weight, m.bias, activation="relu", extra=extra)


def test_outliers_that_are_fixed_or_absent():
    m, x = linear(), tokens(6, K)
    fixed = OutlierLinear.from_linear(m, columns=[1, 5])
    others = x.clone()
    others[:, [1, 5]] = 0
    check(fixed(x), others, m.weight, m.bias, extra=x[:, [1, 5]].double() @ m.weight[:, [1, 5]].double().T)
    assert_bitwise_equal(OutlierLinear.from_linear(m, threshold=100.0)(x), Int8Linear.from_linear(m)(x))
    everything = OutlierLinear.from_linear(m, threshold=1e-6)(x)
    assert_close_to_truth(everything, x.double() @ m.weight.double().T + m.bias.double(), m(x))


def test_smoothing():
    """x divided, W multiplied, inside or before: three ways to the same integers where the factors are powers of 2."""
    m, x = linear(), tokens(4, K)
    s = 2.0 ** torch.randint(-3, 4, (K,), generator=torch.Generator().manual_seed(3)).float()
    inside = Int8Linear.from_linear(m, smooth=s)
    check(inside(x), x / s, m.weight * s, m.bias)
    before = Int8Linear.from_linear(m, smooth=s, folded=True)
    assert before.smooth is None
    assert_bitwise_equal(before(x / s), inside(x))


def test_a_chain_in_int8():
    """A static layer hands the next one int8: what comes out is what quantising its float result gives."""
    first, second, x = linear(), linear(N, 8, seed=1), tokens(2, 5, K)
    scale = 0.02
    chained = Int8Linear.from_linear(first, input_scale=0.02, activation="gelu", output_scale=scale)
    plain = Int8Linear.from_linear(first, input_scale=0.02, activation="gelu")
    last = Int8Linear.from_linear(second, input_scale=scale)
    with torch.no_grad():
        q = chained(x)
    assert q.dtype == torch.int8
    same = chained(x.requires_grad_())  # for a gradient, in floating point
    assert_close_to_truth(same, q.double() * np.float32(scale), q.float() * np.float32(scale))
    (dx,) = torch.autograd.grad(last(same).sum(), x)
    (expected,) = torch.autograd.grad(last(plain(x)).sum(), x)
    torch.testing.assert_close(dx, expected)
    x = x.detach()
    assert_bitwise_equal(last(same).detach(), last(q).detach())
    expected = np.clip(np.rint(plain(x).detach().double().numpy() / np.float64(np.float32(scale))), -128, 127)
    assert (np.abs(q.numpy() - expected) <= 1).all() and (q.numpy() == expected).mean() > 0.99
    y = last(q)
    assert y.dtype == torch.float32
    q_w, s_w = round_to_int8(second.weight)
    acc = torch.from_numpy(q.numpy().astype(np.int64) @ q_w.T).double()
    truth = acc * (np.float32(scale) * torch.from_numpy(s_w).double()) + second.bias.double()
    float32 = acc.float() * (np.float32(scale) * torch.from_numpy(s_w)) + second.bias
    assert_close_to_truth(y, truth, float32)
    assert copy.deepcopy(last).bfloat16()(q).dtype == torch.bfloat16


# ---- gradients -------------------------------------------------------------------------------------------------------


def dequantised(layer):
    return layer.plain_weight().double() * layer.weight_scale.double()[:, None]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("make", [Int8Linear, Sparse24Int8Linear])
def test_gradients_go_straight_through(make, activation):
    """Those of act(x Ŵᵀ + b) with the activation's slope at the int8 result, in float64, nothing where x is clipped."""
    m, scale = linear(), 0.012
    layer, before = (make.from_linear(m, input_scale=scale, activation=a) for a in (activation, "none"))
    x = tokens(2, 5, K).requires_grad_()
    g = tokens(2, 5, N, seed=3)
    dx, db = torch.autograd.grad(layer(x), (x, layer.bias), g)

    def gradients(dtype):
        z = before(x.detach()).to(dtype).requires_grad_()
        (dz,) = torch.autograd.grad(ACTIVATIONS[activation](z), z, g.to(dtype))
        inside = (x.detach().abs() <= 127 * layer.input_scale).to(dtype)
        return (dz @ dequantised(layer).to(dtype)) * inside, dz.sum((0, 1))

    for found, truth, y in zip((dx, db), gradients(torch.float64), gradients(torch.float32), strict=True):
        assert_close_to_truth(found, truth, y, magnitude=truth.abs().max().expand_as(truth))
    assert (dx[(x.abs() > 127 * layer.input_scale)] == 0).all() and (x.abs() > 127 * layer.input_scale).any()


def test_gradients_of_outliers():
    m, x = linear(), tokens(6, K).requires_grad_()
    layer = OutlierLinear.from_linear(m, threshold=2.0)
    w = dequantised(layer)
    outlier = (x.detach().abs() >= 2.0).any(0)
    assert 0 < int(outlier.sum()) < K
    w[:, outlier] = m.weight.detach().double()[:, outlier]
    g = tokens(6, N, seed=3)
    (dx,) = torch.autograd.grad(layer(x), x, g)
    assert_close_to_truth(dx, g.double() @ w, g @ w.float())


@pytest.mark.parametrize("make", [Int8Linear, Sparse24Int8Linear])
def test_second_derivatives(make):
    """Of the activation at least: those of the float formula, as torch.func has them, and in float64."""
    layer, x = make.from_linear(linear(), activation="gelu"), tokens(5, K).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(dx.square().sum(), x)
    double = torch.func.grad(lambda x: torch.func.grad(lambda x: layer(x).sum())(x).square().sum())(x.detach())
    torch.testing.assert_close(found, double)

    def penalty(x, dtype):
        q, scale = round_to_int8(x)
        z = (torch.from_numpy(q) * torch.from_numpy(scale).double()[:, None]).to(dtype).requires_grad_()
        y = F.gelu(z @ dequantised(layer).to(dtype).T + layer.bias.detach().to(dtype))
        (dz,) = torch.autograd.grad(y.sum(), z, create_graph=True)
        return torch.autograd.grad(dz.square().sum(), z)[0]

    truth = penalty(x, torch.float64)
    assert_close_to_truth(found, truth, penalty(x, torch.float32), magnitude=truth.abs().max().expand_as(truth))


def test_qat_compiled():
    """One graph, the same gradients."""
    torch._dynamo.reset()
    layer, x = QATLinear(linear(), activation="gelu", input_scale=0.02), tokens(5, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x).square().sum(), (layer.linear.weight, layer.linear.bias))
               for f in (compiled, layer)]  # fmt: skip
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_qat_is_what_is_deployed():
    """The float result that is trained and the int8 one, and the gradient of the weights: that of the rounded layer."""
    for kind, prune in (("int8", lambda w: w), ("sparse24_int8", two_of_four)):
        for input_scale in (None, 0.02):
            for smooth in (None, 0.5 + torch.rand(K)):
                m, x = linear(), tokens(2, 5, K)
                layer = QATLinear(m, kind, "gelu", input_scale, smooth)
                deployed = layer.deployed()
                assert type(deployed) is (Int8Linear if kind == "int8" else Sparse24Int8Linear)
                s = 1.0 if smooth is None else smooth
                truth = formula(x / s, prune(m.weight) * s, m.bias, "gelu", input_scale)
                magnitude = truth.abs().max().expand_as(truth)
                for y in (layer(x), deployed(x)):
                    assert_close_to_truth(
                        y, truth, formula(x / s, prune(m.weight) * s, m.bias, "gelu", input_scale, dtype=torch.float32),
                        magnitude=magnitude,
                    )  # fmt: skip
    m, x, g = linear(), tokens(6, K), tokens(6, N, seed=4)
    layer = QATLinear(m)
    dw, db = torch.autograd.grad(layer(x), (m.weight, m.bias), g)
    q, scale = round_to_int8(x)
    rounded = torch.from_numpy(q).double() * torch.from_numpy(scale).double()[:, None]
    assert_close_to_truth(dw, g.double().T @ rounded, g.T @ rounded.float(), magnitude=g.abs().T @ x.abs())
    assert_bitwise_equal(db, g.sum(0))


def test_sparse24_linear():
    m, x = linear(), tokens(2, 5, K).requires_grad_()
    layer = Sparse24Linear.from_linear(m)
    w = two_of_four(m.weight)
    assert_bitwise_equal(layer.plain_weight().detach(), w)
    truth = F.linear(x.detach().double(), w.double(), m.bias.double())
    assert_close_to_truth(layer(x), truth, F.linear(x, w, m.bias))
    g = tokens(2, 5, N, seed=3)
    dx, dvalues = torch.autograd.grad(layer(x), (x, layer.values), g)
    assert_close_to_truth(dx, g.double() @ w.double(), g @ w)
    dense = g.flatten(0, 1).double().T @ x.detach().flatten(0, 1).double()
    kept = dense[w != 0].view_as(dvalues)  # no entry of the weight is 0 by itself
    magnitude = kept.abs().max().expand_as(kept)
    float32 = (g.flatten(0, 1).T @ x.detach().flatten(0, 1))[w != 0].view_as(dvalues)
    assert_close_to_truth(dvalues, kept, float32, magnitude=magnitude)
    fresh = Sparse24Linear(K, N)
    assert ((fresh.plain_weight() != 0).sum(1) == K // 2).all() and float(fresh(x).detach().std()) > 0.1


# ---- state -----------------------------------------------------------------------------------------------------------

MADE = {
    "int8": lambda m: Int8Linear.from_linear(m, activation="gelu"),
    "static": lambda m: Int8Linear.from_linear(m, input_scale=0.02, output_scale=0.05),
    "smooth": lambda m: Int8Linear.from_linear(m, smooth=torch.linspace(0.5, 2, K)),
    "no_bias": lambda m: Int8Linear.from_linear(linear(bias=False)),
    "sparse": lambda m: Sparse24Int8Linear.from_linear(m, activation="relu"),
    "outlier": lambda m: OutlierLinear.from_linear(m, threshold=2.0),
    "outlier_int8": lambda m: OutlierLinear.from_linear(m, threshold=2.0, keep_weight=False),
    "outlier_fixed": lambda m: OutlierLinear.from_linear(m, columns=[3, 4, 7]),
    "sparse_float": Sparse24Linear.from_linear,
}


@pytest.fixture(params=MADE)
def layer(request):
    return MADE[request.param](linear())


def test_state_dict(layer, tmp_path):
    """By name, in canonical form, loaded strictly into a fresh layer of the same options; as safetensors too."""
    safetensors = pytest.importorskip("safetensors.torch")
    x, state = tokens(5, K), layer.state_dict()
    assert "packed" not in state and all(isinstance(t, torch.Tensor) for t in state.values())
    other = type(layer)(**layer.options())
    other.load_state_dict(state, strict=True)
    assert_bitwise_equal(other(x), layer(x))
    safetensors.save_file(state, tmp_path / "layer.safetensors")
    for assign in (False, True):
        third = type(layer)(**layer.options(), device="meta" if assign else None)
        third.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"), strict=True, assign=assign)
        assert_bitwise_equal(third(x), layer(x))
    for name, t in state.items():
        assert_bitwise_equal(third.state_dict()[name], t)


def test_copies_and_casts(layer):
    x = tokens(5, K)
    y = layer(x)
    assert_bitwise_equal(copy.deepcopy(layer)(x), y)
    assert_bitwise_equal(pickle.loads(pickle.dumps(layer))(x), y)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        other = copy.deepcopy(layer).to(dtype)
        scales = [n for n, t in other.named_buffers() if "scale" in n or n == "smooth"]
        assert all(other.get_buffer(n).dtype == torch.float32 for n in scales)
        assert all(torch.equal(other.get_buffer(n), layer.get_buffer(n)) for n in scales)
        found = other(x.to(dtype))
        assert found.dtype == dtype
        # x, the weights of the outliers and the result are rounded to the dtype, which moves steps
        assert float((found.double() - y.double()).norm() / y.double().norm()) < 0.02
    meta = copy.deepcopy(layer).to("meta")
    assert meta(x.to("meta")).shape == y.shape
    back = meta.to_empty(device="cpu")
    back.load_state_dict(layer.state_dict())
    assert_bitwise_equal(back(x), y)
    assert layer(x[:0]).shape == (0, N) and layer(x[0]).shape == (N,)


def test_compiled(layer):
    """One graph, forward and backward, at any batch size."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 8):
        x = tokens(2, n, K)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))
        if y.is_floating_point():
            g = tokens(2, n, N, seed=2)
            results = [
                torch.autograd.grad(f(z), z, g)[0]
                for f, z in ((compiled, x.clone().requires_grad_()), (layer, x.clone().requires_grad_()))
            ]
            torch.testing.assert_close(*results)


def test_exported(layer):
    if type(layer) is OutlierLinear and layer.columns is None:
        layer.requires_grad_(False)
    x = tokens(5, K)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    with torch.no_grad():
        for given in (x, tokens(9, K, seed=5)):
            torch.testing.assert_close(program.module()(given), layer(given))


def test_autocast(layer):
    x = tokens(5, K)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        with torch.no_grad():
            int8 = getattr(layer, "output_scale", None) is not None
            assert layer(x).dtype == (torch.int8 if int8 else torch.bfloat16)


@pytest.mark.parametrize("make", [Int8Linear, Sparse24Int8Linear])
def test_what_is_written_counts(make):
    """Weights and scales changed in place, replaced or loaded: the packed copy follows."""
    layer, other, x = make.from_linear(linear()), make.from_linear(linear(seed=5)), tokens(5, K)
    first = layer.integers[0]
    getattr(layer, first).copy_(getattr(other, first))
    setattr(layer, layer.integers[-1], getattr(other, layer.integers[-1]).clone())
    layer.weight_scale.copy_(other.weight_scale)
    with torch.no_grad():
        layer.bias.copy_(other.bias)
    assert_bitwise_equal(layer(x), other(x))


def test_the_bias_is_shared():
    m = linear()
    for layer in (Int8Linear.from_linear(m), OutlierLinear.from_linear(m), Sparse24Linear.from_linear(m)):
        assert layer.bias is m.bias


def test_gradients_or_not_is_the_same_result(layer):
    x = tokens(5, K)
    with torch.no_grad():
        expected = layer(x)
    found = layer(x.requires_grad_()).detach()
    if expected.dtype == torch.int8:
        expected = expected.float() * layer.output_scale
    assert_bitwise_equal(found, expected)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors():
    layer, static = Int8Linear.from_linear(linear()), Int8Linear.from_linear(linear(), input_scale=0.1)
    with pytest.raises(ValueError, match=r"^effvit::Int8Linear: x must be \[..., 36\], got \[5, 35\]"):
        layer(tokens(5, 35))
    with pytest.raises(TypeError, match="Int8Linear: x must be floating point, got torch.int8"):
        layer(torch.zeros(5, K, dtype=torch.int8))
    with pytest.raises(TypeError, match="Int8Linear: x must be floating point or int8, got torch.int64"):
        static(torch.zeros(5, K, dtype=torch.int64))
    with pytest.raises(ValueError, match="Int8Linear: activation must be one of none, relu, gelu, silu, got 'tanh'"):
        Int8Linear(4, 4, activation="tanh")
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Int8Linear: input_scale must be positive and finite"):
            Int8Linear.from_linear(linear(), input_scale=scale)
    broken = linear()
    with torch.no_grad():
        broken.weight[3, 4] = float("nan")
    for make in (Int8Linear, Sparse24Int8Linear, OutlierLinear):
        with pytest.raises(ValueError, match=f"{make.__name__}: weight must be finite, got NaN or infinity"):
            make.from_linear(broken)
    for make in (Sparse24Int8Linear, Sparse24Linear):
        with pytest.raises(ValueError, match=f"{make.__name__}: in_features must be a multiple of 4, got 6"):
            make(6, 8)
        with pytest.raises(ValueError, match=f"{make.__name__}: in_features must be a multiple of 4, got 6"):
            make.from_linear(linear(6, 8))
    with pytest.raises(ValueError, match="OutlierLinear: threshold must be positive, got 0"):
        OutlierLinear(4, 4, threshold=0.0)
    with pytest.raises(
        ValueError, match="QATLinear: kind must be int8, sparse24_int8 or block_sparse_int8, got 'outlier'"
    ):
        QATLinear(linear(), "outlier")


@pytest.mark.parametrize(
    "columns, error, message",
    [
        ([1, 1], ValueError, r"columns must be each given once, got \[1, 1\]"),
        ([99, 2], ValueError, r"columns must be from 0 to 35, got \[2, 99\]"),
        ([-1], ValueError, r"columns must be from 0 to 35, got \[-1\]"),
        ([0.5], TypeError, "columns must be a one-dimensional sequence of integers, got torch.float32"),
        ([[1, 2]], TypeError, r"columns must be a one-dimensional sequence of integers, got torch.int64 \[1, 2\]"),
        ([True] * K, TypeError, "columns must be a one-dimensional sequence of integers, got torch.bool"),
    ],
    ids=str,
)
def test_columns(columns, error, message):
    with pytest.raises(error, match=f"^effvit::OutlierLinear: {message}"):
        OutlierLinear.from_linear(linear(), columns=columns)


def test_columns_in_any_order():
    m, x = linear(), tokens(5, K)
    layer = OutlierLinear.from_linear(m, columns=[5, 1])
    assert layer.columns.tolist() == [1, 5] and OutlierLinear.from_linear(m, columns=[]).columns.tolist() == []
    assert_bitwise_equal(layer(x), OutlierLinear.from_linear(m, columns=torch.tensor([1, 5]))(x))


def test_smooth_and_scales_that_cannot_be():
    for make in (Int8Linear.from_linear, Sparse24Int8Linear.from_linear, lambda m, smooth: QATLinear(m, smooth=smooth)):
        for wrong in (torch.ones(1), torch.ones(N), torch.ones(K, 1)):
            with pytest.raises(ValueError, match=r"smooth must be \[36\]"):
                make(linear(), smooth=wrong)
        for value in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="smooth must be positive and finite"):
                make(linear(), smooth=torch.ones(K).index_fill(0, torch.tensor([3]), value))
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="QATLinear: input_scale must be positive and finite"):
            QATLinear(linear(), input_scale=value)
        layer = Int8Linear.from_linear(linear(), input_scale=0.1)
        with pytest.raises(ValueError, match="Int8Linear: output_scale must be positive and finite"):
            layer.fuse("gelu", torch.tensor([value]))
        assert layer.activation == "none" and layer.output_scale is None
        with pytest.raises(ValueError, match="Int8Linear: activation must be one of"):
            layer.fuse("tanh")
        full = Int8Linear.from_linear(linear(), input_scale=0.1, output_scale=0.2, smooth=torch.ones(K))
        for name in ("input_scale", "output_scale", "smooth", "weight_scale"):
            state = {**full.state_dict(), name: torch.full_like(getattr(full, name), value)}
            with pytest.raises(RuntimeError, match=f"{name} must be positive and finite"):
                copy.deepcopy(full).load_state_dict(state)


@pytest.mark.parametrize(
    "make", [Int8Linear.from_linear, Sparse24Linear.from_linear, OutlierLinear.from_linear, QATLinear]
)
def test_input_by_keyword(make):
    """As nn.Linear takes it."""
    layer, x = make(linear()), tokens(5, K)
    assert_bitwise_equal(layer(input=x), layer(x))


def test_a_float_checkpoint_is_refused():
    """Copied into an int8 buffer it would be zeros."""
    layer, m = Int8Linear.from_linear(linear()), linear()
    with pytest.raises(RuntimeError, match=r"weight must be torch.int8, got torch.float32: load it into the float"):
        layer.load_state_dict({**layer.state_dict(), "weight": m.weight})
    assert_bitwise_equal(layer(tokens(2, K)), Int8Linear.from_linear(m)(tokens(2, K)))


def test_repr():
    layer = Int8Linear.from_linear(linear(), input_scale=0.1, activation="gelu", smooth=torch.ones(K))
    assert repr(layer) == (
        "Int8Linear(in_features=36, out_features=22, bias=True, activation=gelu, static, smooth)"
    )  # fmt: skip
    assert "kind=int8" in repr(QATLinear(linear())) and effvit.layers.Int8Linear is Int8Linear
