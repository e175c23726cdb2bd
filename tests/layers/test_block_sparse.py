"""BlockSparseLinear and BlockSparseInt8Linear against plain formulas; block masks of effvit.sparsify_ and the flow."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effvit
from effvit import block_sparse
from effvit.layers import BlockSparseInt8Linear, BlockSparseLinear, Int8Linear, QATLinear
from effvit.quantize import effective_weight
from effvit.sparsify import BlockMask, block_scores, choose_blocks, mask_of
from effvit.testing import assert_bitwise_equal

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def linear(k=64, n=96, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Linear(k, n, dtype=dtype)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 30))


def data(n=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(20, 64, generator=generator) * torch.linspace(0.01, 3, 64) for _ in range(n)]


def masked(m, block, density=0.5):
    return m.weight.detach() * block_sparse.mask(m.weight, density=density, block=block)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_is_its_formula(block, activation):
    m = linear(dtype=torch.float64)
    layer = BlockSparseLinear.from_linear(m, block=block, density=0.5, activation=activation)
    w = masked(m, block).requires_grad_()
    x = torch.randn(2, 5, 64, dtype=torch.float64, requires_grad=True)
    expected = ACTIVATIONS[activation](F.linear(x, w, m.bias))
    found = layer(x)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    dx, dw, db = torch.autograd.grad(expected, (x, w, m.bias), grad)
    fx, fv, fb = torch.autograd.grad(found, (x, layer.values, layer.bias), grad)
    torch.testing.assert_close((fx, fb), (dx, db))
    kept = block_sparse.compress(dw, block=block, mask=w != 0)[0]
    torch.testing.assert_close(fv, kept)
    assert layer.bias is m.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_serve_the_layer(dtype):
    m = linear(dtype=dtype)
    layer = BlockSparseLinear.from_linear(m, density=0.5, activation="gelu")
    x = torch.randn(3, 64, dtype=dtype)
    parts = layer.values, layer.crow, layer.columns
    assert_bitwise_equal(layer(x), effvit.block_sparse_linear(x, *parts, layer.bias, activation="gelu"))


@pytest.mark.parametrize("block", [16, 32])
def test_way_back(block):
    m = linear()
    layer = BlockSparseLinear.from_linear(m, block=block, density=0.5)
    back = layer.to_linear()
    assert type(back) is nn.Linear and back.bias is m.bias
    assert_bitwise_equal(back.weight.detach(), masked(m, block))
    again = BlockSparseLinear.from_linear(back, block=block)  # those that are not zero
    for name, t in layer.state_dict().items():
        assert_bitwise_equal(again.state_dict()[name], t)
    whole = BlockSparseLinear.from_linear(m, density=1.0).to_linear()
    assert_bitwise_equal(whole.weight.detach(), m.weight.detach())


@pytest.mark.parametrize("make", [BlockSparseLinear, BlockSparseInt8Linear])
def test_state_dict(make):
    m = linear()
    layer = make.from_linear(m, block=32, density=0.5, activation="silu")
    fresh = make(**layer.options())
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(7, 64)
    assert_bitwise_equal(fresh(x).detach(), layer(x).detach())
    assert set(layer.state_dict()) >= {"values", "crow", "columns", "bias"}
    other = copy.deepcopy(layer)
    assert_bitwise_equal(other(x).detach(), layer(x).detach())
    empty = make(64, 96, blocks=7)
    assert torch.isfinite(empty(x)).all() and len(empty.columns) == 7
    assert "blocks=7 of 24" in repr(empty)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"input_scale": 0.03}, {"smooth": True}])
def test_int8_is_int8_linear_of_the_masked_weight(block, options):
    m = linear()
    options = dict(options)
    if "smooth" in options:
        options["smooth"] = torch.rand(64) + 0.5
    dense = linear()
    dense.weight = nn.Parameter(masked(m, block))
    x = torch.randn(2, 9, 64, requires_grad=True)
    found = BlockSparseInt8Linear.from_linear(m, block=block, density=0.5, **options)
    expected = Int8Linear.from_linear(dense, **options)
    assert_bitwise_equal(found.plain_weight(), expected.weight)
    a, b = found(x), expected(x)
    assert_bitwise_equal(a.detach(), b.detach())
    g = torch.randn_like(a)
    assert_bitwise_equal(torch.autograd.grad(a, x, g)[0], torch.autograd.grad(b, x, g)[0])


def test_int8_output_and_casts():
    m = linear()
    layer = BlockSparseInt8Linear.from_linear(m, density=0.5, input_scale=0.03, output_scale=0.02)
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert layer(x).dtype == torch.int8
    half = copy.deepcopy(layer).bfloat16()
    assert half.weight_scale.dtype == torch.float32 and half.values.dtype == torch.int8


@pytest.mark.parametrize("score", ["magnitude", "second_order"])
@pytest.mark.parametrize("spread", ["layer", "global"])
@pytest.mark.parametrize("block", [16, 32])
def test_flow(score, spread, block, capsys):
    """sparsify_, train, deploy in floats and in int8, and back, exactly."""
    m, x = model(), torch.randn(9, 64)
    before, keys = m(x).detach(), list(m.state_dict())
    originals = list(m.parameters())
    options = {"calibration": data()} if score == "second_order" else {}
    sparsity = effvit.sparsify_(m, pattern="block", block=block, score=score, spread=spread, **options)
    assert f"blocks of {block} x {block}, {score}" in capsys.readouterr().out
    assert [r.changed for r in sparsity] == [True, True, False]
    masks = [mask_of(m[i]) for i in (0, 2)]
    kept = sum(int(k.blocks.sum()) for k in masks)
    assert kept == round(0.5 * sum(k.blocks.numel() for k in masks))
    optimizer = torch.optim.SGD(m.parameters(), 0.1)
    m(x).square().mean().backward()
    grad = m[0].parametrizations.weight.original.grad
    assert (grad[~masks[0].entries()] == 0).all() and (grad != 0).any()
    optimizer.step()
    trained = m(x).detach()
    effvit.quantize_(m, kind="block_sparse", verbose=False)
    assert [type(m[i]) for i in (0, 2, 4)] == [BlockSparseLinear, BlockSparseLinear, nn.Linear]
    assert len(m[0].columns) == int(masks[0].blocks.sum()) and m[0].values.shape[-1] == block
    torch.testing.assert_close(m(x).detach(), trained)
    effvit.unquantize_(m, verbose=False)
    assert_bitwise_equal(m(x).detach(), trained)
    report = effvit.quantize_(m, kind="block_sparse_int8", verbose=False)
    assert type(m[2]) is BlockSparseInt8Linear and report.bytes_after < 0.3 * report.bytes_before
    assert (m(x) - trained).norm() < 0.05 * trained.norm()
    effvit.unquantize_(m, verbose=False)
    effvit.unsparsify_(m, verbose=False)
    assert list(m.state_dict()) == keys and all(a is b for a, b in zip(m.parameters(), originals, strict=True))
    assert before.shape == m(x).shape


def test_quantize_alone_prunes_by_magnitude():
    m = model()
    weight = masked(m[0], 32, 0.25)
    effvit.quantize_(m, kind="block_sparse", block=32, density=0.25, verbose=False)
    assert_bitwise_equal(m[0].plain_weight().detach(), weight)


def test_qat_and_convert():
    m = model()
    effvit.sparsify_(m, pattern="block", verbose=False)
    effvit.quantize_(m, kind="block_sparse_int8", qat=True, verbose=False)
    assert type(m[0]) is QATLinear
    x = torch.randn(9, 64)
    m(x).square().mean().backward()
    trained = m(x).detach()
    rounded = effective_weight(m[0], None)
    effvit.convert_(m, verbose=False)
    assert type(m[0]) is BlockSparseInt8Linear
    torch.testing.assert_close(effective_weight(m[0], None), rounded)
    torch.testing.assert_close(m(x).detach(), trained, rtol=1e-3, atol=1e-4)
    dense = model()
    with pytest.raises(ValueError, match="linear must be one that effvit.sparsify_ has cut into blocks"):
        QATLinear(dense[0], "block_sparse_int8")


def test_save_and_load(tmp_path):
    pytest.importorskip("safetensors")
    m, x = model(), torch.randn(9, 64)
    effvit.sparsify_(m, pattern="block", densities={"0": 0.25}, verbose=False)
    effvit.quantize_(m, kind="block_sparse_int8", layers={"2": "block_sparse"}, verbose=False)
    effvit.save_quantized(m, tmp_path / "m.safetensors")
    other = effvit.load_quantized_(model(), tmp_path / "m.safetensors")
    assert [type(other[i]) for i in (0, 2)] == [BlockSparseInt8Linear, BlockSparseLinear]
    assert len(other[0].columns) == 6
    assert_bitwise_equal(other(x).detach(), m(x).detach())


def test_decay():
    m = model()
    sparsity = effvit.sparsify_(m, pattern="block", decay="linear", steps=2, verbose=False)
    w = m[0].parametrizations.weight.original.detach()
    there = mask_of(m[0]).entries()
    for decay in (1.0, 0.5, 0.0):
        assert_bitwise_equal(m[0].weight.detach(), torch.where(there, w, w * decay))
        sparsity.step()


@pytest.mark.parametrize("block", [16, 32])
def test_second_order_scores_are_changes_of_the_output(block):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 96, generator=generator, dtype=torch.float64)
    x = torch.randn(50, 96, generator=generator, dtype=torch.float64)
    found = block_scores(w, block, x)
    changes = torch.zeros_like(found)
    for i in range(64 // block):
        for j in range(96 // block):
            without = w.clone()
            without[block * i : block * (i + 1), block * j : block * (j + 1)] = 0
            changes[i, j] = (x @ (w - without).T).square().sum()
    torch.testing.assert_close(found, changes / changes.sum())
    norms = block_scores(w, block)
    assert norms.sum() == pytest.approx(1.0) and not torch.allclose(norms, found)


def test_second_order_beats_magnitude():
    """Where inputs have different sizes, what is kept by outputs keeps them better."""
    errors = {}
    for score in ("magnitude", "second_order"):
        m = model()
        options = {"calibration": data()} if score == "second_order" else {}
        before = [torch.cat([m[0](x) for x in data()])]
        effvit.sparsify_(m, pattern="block", score=score, verbose=False, progress=False, **options)
        errors[score] = float((torch.cat([m[0](x) for x in data()]) - before[0]).norm())
    assert errors["second_order"] < 0.9 * errors["magnitude"]


def test_choice_within_a_budget():
    scores = {"a": torch.tensor([[9.0, 8.0], [7.0, 6.0]]), "b": torch.tensor([[1.0, 2.0], [4.0, 3.0]])}
    kept = choose_blocks(scores, dict.fromkeys(scores, 0.5), None)
    assert kept["a"].tolist() == [[True, True], [False, False]] and kept["b"].tolist() == [[False, False], [True, True]]
    kept = choose_blocks(scores, {}, 0.5)
    assert kept["a"].tolist() == [[True, True], [True, False]] and kept["b"].tolist() == [[False, False], [True, False]]
    kept = choose_blocks(scores, {"a": 0.0, "b": 1.0}, None)
    assert not kept["a"].any() and kept["b"].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "3:4"}, "pattern must be one of 2:4, block"),
        ({"block": 8}, "block must be 16 or 32, got 8"),
        ({"density": 1.5}, "density must be between 0 and 1, got 1.5"),
        ({"densities": {"0": -1}}, r"densities\['0'\] must be between 0 and 1, got -1"),
        ({"spread": "even"}, "spread must be one of layer, global"),
        ({"score": "luck"}, "score must be one of magnitude, second_order"),
        ({"score": "second_order"}, "calibration must be batches of data for score second_order, got None"),
        ({"calibration": []}, "calibration must be None for score magnitude"),
        ({"spread": "global", "densities": {"0": 0.1}}, "densities must be left out where spread is global"),
        ({"pattern": "2:4", "block": 32}, "block must be left out where the pattern is 2:4"),
    ],
)
def test_errors(options, message):
    m = model()
    with pytest.raises(ValueError, match=message):
        effvit.sparsify_(m, **{"pattern": "block", **options})
    assert not any(isinstance(child, BlockMask) for child in m.modules())


@pytest.mark.parametrize("make", [BlockSparseLinear, BlockSparseInt8Linear])
def test_errors_of_layers(make):
    name = make.__name__
    for call, message in (
        (lambda: make(64, 96, block=8), f"{name}: block must be 16 or 32, got 8"),
        (lambda: make(60, 96), f"{name}: in_features must be a multiple of the block, 16, got 60"),
        (lambda: make(64, 90), f"{name}: out_features must be a multiple of the block, 16, got 90"),
        (lambda: make(64, 96, blocks=25), f"{name}: blocks must be between 0 and 24, got 25"),
        (lambda: make.from_linear(linear(), density=0.5, mask=torch.ones(96, 64, dtype=torch.bool)),
         f"{name}: density must be None where a mask is given"),
        (lambda: make(64, 96, activation="tanh"), f"{name}: activation must be one of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
