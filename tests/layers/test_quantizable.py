"""What effvit.quantize_ and its kin refuse, leave alone or check, and that a model which they refuse is as it was."""

import copy
import math

import pytest
import torch
from layer_suite import tokens
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils import prune

import effvit
from effvit.layers import BinaryLinear, PAMLinear, Pow2Linear, PTQLinear, QATLinear, QuantLinear

torchvision_swin = pytest.importorskip("torchvision.models.swin_transformer")


def quantize(model, **options):
    return effvit.quantize_(model, verbose=False, progress=False, **options)


def two(k=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(k, k), nn.Linear(k, k))


@pytest.mark.parametrize("layer", [BinaryLinear, PAMLinear, Pow2Linear, PTQLinear, QuantLinear])
def test_layers_of_masked_weights(layer):
    """from_linear of one that effvit.sparsify_ has masked: what the mask leaves, as a parameter of its own."""
    model = two()
    effvit.sparsify_(model, verbose=False)
    made = layer.from_linear(model[0])
    assert isinstance(made.weight, nn.Parameter) and made.weight.requires_grad
    assert torch.equal(made.weight, model[0].weight) and torch.equal(made.bias, model[0].bias)
    assert int(made.weight.view(-1, 4).ne(0).sum(1).max()) == 2
    if layer is BinaryLinear:
        torch.testing.assert_close(made.scale.detach(), model[0].weight.detach().abs().mean(1))


# ---- layers that are left alone --------------------------------------------------------------------------------------


def torchvision(block):
    return torchvision_swin.SwinTransformer(
        [2, 2], 16, [1, 1], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=5, block=block,
        downsample_layer=torchvision_swin.PatchMergingV2,
    )  # fmt: skip


SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}
READERS = {
    "timm_swin_v2": lambda: SwinTransformerV2(
        img_size=16, patch_size=2, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4, num_classes=5
    ),
    "timm_beit": lambda: Beit(**SMALL),
    "timm_eva": lambda: Eva(**SMALL, qkv_fused=True),
    "torchvision_v1": lambda: torchvision(torchvision_swin.SwinTransformerBlock),
    "torchvision_v2": lambda: torchvision(torchvision_swin.SwinTransformerBlockV2),
}


@pytest.mark.parametrize("qat", [False, True], ids=["int8", "qat"])
@pytest.mark.parametrize("make", READERS.values(), ids=READERS)
def test_a_weight_that_another_module_reads(make, qat):
    """These attentions call F.linear on their qkv's weight: it stays float, what they call as a module does not."""
    torch.manual_seed(0)
    model, x = make().eval(), tokens(2, 3, 16, 16)
    y = model(x)
    report = quantize(model, qat=qat)
    left = {r.name.rpartition(".")[2]: r.detail for r in report.unchanged if "reads its weight itself" in r.detail}
    is_torchvision = "torchvision" in type(model).__module__
    assert set(left) == ({"qkv", "proj"} if is_torchvision else {"qkv"}) and "Attention" in left["qkv"]
    names = {r.name.rpartition(".")[2] for r in report.changed}
    assert names >= ({"0", "3"} if is_torchvision else {"proj", "fc1", "fc2"})
    assert float((model(x) - y).detach().norm() / y.detach().norm()) < 0.1


def test_readers_of_every_form():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = nn.Linear(8, 8)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.by_method, self.by_property, self.init = (nn.Linear(8, 8) for _ in range(4))
            self.inner = Inner()
            nn.init.zeros_(self.init.weight)

        @property
        def w(module):
            return module.by_property.weight

        def helper(self, x):
            return nn.functional.linear(x, self.by_method.weight)

        def forward(self, x):
            x = [f(self.called(x)) for f in (lambda t: nn.functional.linear(t, self.inner.deep.weight),)][0]
            return self.init(nn.functional.linear(self.helper(x), self.w))

    class Derived(Outer):
        def forward(self, x):
            return super().forward(x) + 1

    model = Derived()
    report = quantize(model)
    assert {r.name for r in report.changed} == {"called", "init"}
    assert {r.detail for r in report.unchanged} == {"Derived reads its weight itself"} and len(report.unchanged) == 3
    model(tokens(2, 8))
    masked = Derived()
    assert len(effvit.sparsify_(masked, verbose=False).report.changed) == 5  # a mask serves every reader
    masked(tokens(2, 8))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("how", ["prune", "prune_bias", "weight_norm"])
def test_a_weight_that_a_hook_makes(how):
    model, x = two(), tokens(3, 8)
    if how == "weight_norm":
        nn.utils.weight_norm(model[0])
    else:
        prune.l1_unstructured(model[0], "bias" if how == "prune_bias" else "weight", 0.5)
    y = model(x)
    for change in (quantize, lambda m: effvit.sparsify_(m, verbose=False)):
        other = nn.Sequential(model[0], nn.Linear(8, 8))
        (row,) = [r for r in change(other) if not r.changed]
        assert row.name == "0" and "is not a parameter but made anew in every call" in row.detail
        other(x)
    torch.testing.assert_close(model(x), y)


def test_a_forward_of_an_instance():
    model, x = two(), tokens(3, 8)
    model[0].forward = lambda x: x * 0
    report = quantize(model)
    assert [(r.name, r.detail) for r in report.unchanged] == [("0", "its forward has been replaced on the instance")]
    torch.testing.assert_close(model(x), model[1](0 * x))


# ---- the way back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"kind": "outlier"}, {"qat": True}, {"smooth": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_cast_in_between(dtype, options):
    """The float layers and norms come back in the dtype that the model has by then."""
    model, x = VisionTransformer(**SMALL).eval(), tokens(2, 3, 16, 16)
    calibration = {"calibration": [x]} if "smooth" in options else {}
    expected = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    quantize(model, **options, **calibration)
    model.to(dtype)(x.to(dtype))
    effvit.unquantize_(model, verbose=False)
    found = dict(model.named_parameters())
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], p) and found[name].dtype == dtype for name, p in expected.items())
    model(x.to(dtype))


@pytest.mark.parametrize("algorithm", ["magnitude", "transposable"])
def test_sparse_in_float64(algorithm):
    """The same mask, gradient and int8 weights as in float32, in whose range these weights are."""
    models = [two(16), two(16).double()]
    options = {"kind": "sparse24_int8", "algorithm": algorithm}
    for qat in (False, True):
        first, second = copy.deepcopy(models)
        quantize(first, **options, qat=qat)
        quantize(second, **options, qat=qat)
        if qat:
            torch.testing.assert_close(second(tokens(3, 16).double()), first(tokens(3, 16)).double(), rtol=0, atol=0.03)
        else:
            assert all(torch.equal(a.values, b.values) for a, b in zip(first, second, strict=True))
    grads = []
    for m in models:
        effvit.sparsify_(m, algorithm, decay="linear", steps=2, strength=0.5, verbose=False).step()
        x = tokens(3, 16).to(m[0].parametrizations.weight.original.dtype)
        m(x).square().sum().backward()
        grads.append((m[0].weight.detach(), m[0].parametrizations.weight.original.grad))
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32 and b.dtype == torch.float64
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_norms_trained_after_smoothing(mode):
    """What training has made of a norm stays after convert_ and unquantize_; convert_ folds the factors into it."""
    torch.manual_seed(0)
    model, x = VisionTransformer(**SMALL).eval(), tokens(2, 3, 16, 16)
    parameters = dict(model.named_parameters())
    quantize(model, qat=True, mode=mode, smooth=0.5, calibration=[x])
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters.values()}
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(x).square().sum().backward()
    optimizer.step()
    trained, y = {name: p.detach().clone() for name, p in parameters.items()}, model(x)
    report = effvit.convert_(model, verbose=False)
    in_norm = {r.name for r in report.changed if "smooth in the norm" in r.detail}
    assert in_norm == {"blocks.0.attn.qkv", "blocks.0.mlp.fc1"}
    assert model.blocks[0].attn.qkv.smooth is None and model.blocks[0].mlp.fc2.smooth is not None
    assert not torch.equal(model.blocks[0].norm1.weight, trained["blocks.0.norm1.weight"])
    assert float((model(x) - y).detach().norm() / y.detach().norm()) < 0.02
    effvit.unquantize_(model, verbose=False)
    assert all(p is parameters[name] and torch.equal(p, trained[name]) for name, p in model.named_parameters())


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_no_batches():
    used = iter([tokens(3, 8)])
    list(used)
    for given in ([], used):
        model = two()
        with pytest.raises(ValueError, match="calibration: batches must be at least one, got none"):
            quantize(model, mode="static", calibration=given)
        assert type(model[0]) is nn.Linear and not model[0]._forward_pre_hooks
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"calibration: batches must be positive or None, got {limit}"):
            quantize(two(), mode="static", calibration=[tokens(3, 8)], batches=limit)
    with pytest.raises(TypeError, match="calibration: batches must be an int, got 1.5"):
        quantize(two(), mode="static", calibration=[tokens(3, 8)], batches=1.5)


# ---- sizes and values ------------------------------------------------------------------------------------------------


def test_transposable_needs_rows_too():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8), nn.Linear(8, 8))
    for options in ({}, {"qat": True}):
        report = quantize(copy.deepcopy(model), kind="sparse24_int8", algorithm="transposable", **options)
        assert [r.name for r in report.changed] == ["3"]
        details = {r.name: r.detail for r in report.unchanged}
        assert details["0"] == "out_features 6 is no multiple of 4, for a transposable mask"
        assert "in_features 6" in details["2"]
    report = quantize(
        model, kind="auto", budget=0.5, calibration=[tokens(3, 8)], algorithm="transposable",
        candidates=("int8", "sparse24_int8"),
    )  # fmt: skip
    assert {r.name: r.detail.split()[0] for r in report.changed}["0"] == "Int8Linear"


@pytest.mark.parametrize("options", [{}, {"qat": True}, {"kind": "outlier"}], ids=str)
def test_more_inputs_than_int32_holds(options):
    report = quantize(nn.Sequential(nn.Linear(131076, 1), nn.Linear(8, 8)), **options)
    assert [r.name for r in report.changed] == ["1"]
    assert report.unchanged[0].detail == "in_features 131076 is above 131072: the int32 sums could overflow"


@pytest.mark.parametrize(
    "options", [{}, {"qat": True}, {"kind": "auto", "budget": 0.9, "calibration": [tokens(3, 8)]}], ids=str
)
def test_a_weight_that_is_not_finite(options):
    """An error with the layer's name, and nothing has changed; a mask, which can pass it on, reports it."""
    model = two()
    with torch.no_grad():
        model[1].weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match="quantize_: the weight of 1 must be finite, got NaN or infinity"):
        quantize(model, **options)
    assert [type(m) for m in model] == [nn.Linear] * 2
    report = effvit.sparsify_(model, verbose=False)
    assert math.isnan(report.report.changed[1].weight_error) and "nan" in str(report)


def test_convert_changes_nothing_where_it_fails():
    model = two()
    quantize(model, qat=True)
    with torch.no_grad():
        model[1].linear.weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match="weight must be finite, got NaN or infinity, in 1$"):
        effvit.convert_(model)
    assert [type(m) for m in model] == [QATLinear] * 2


# ---- files -----------------------------------------------------------------------------------------------------------


class Other(nn.Module):
    def __init__(self, k=8, n=8, bias=True, norm=8, extra=False):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(norm), nn.Linear(k, n, bias=bias)
        self.extra = nn.LayerNorm(4) if extra else nn.Identity()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"k": 4}, "model must have a Linear last with in_features 8, got 4"),
        ({"n": 4}, "model must have a Linear last with out_features 8, got 4"),
        ({"bias": False}, "model must have a Linear last with bias True, got False"),
        ({"norm": 4}, r"file's tensors, got norm.bias \[4\] where the file has \[8\], norm.weight"),
        ({"extra": True}, "file's tensors, got extra.weight, which the file has not, extra.bias"),
    ],
    ids=str,
)
def test_files_of_another_architecture(given, message, tmp_path):
    """Found before anything changes."""
    pytest.importorskip("safetensors")
    model, other = Other(), Other(**given)
    quantize(model)
    effvit.save_quantized(model, tmp_path / "model.safetensors")
    before = [(name, m, type(m)) for name, m in other.named_modules()], copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=f"load_quantized_: .*{message}"):
        effvit.load_quantized_(other, tmp_path / "model.safetensors")
    assert before[0] == [(name, m, type(m)) for name, m in other.named_modules()]
    assert all(torch.equal(t, before[1][name]) for name, t in other.state_dict().items())
    if "extra" in given:
        effvit.load_quantized_(other, tmp_path / "model.safetensors", strict=False)
        assert torch.equal(other.last.weight, model.last.weight)


def test_tensors_that_share_memory(tmp_path):
    """A file has one of their names."""
    pytest.importorskip("safetensors")
    model, other = Other(), Other()
    for m in (model, other):
        m.again, m.also = m.norm, m.first
    quantize(model)
    effvit.save_quantized(model, tmp_path / "model.safetensors")
    effvit.load_quantized_(other, tmp_path / "model.safetensors")
    assert (
        torch.equal(other.first.weight, model.first.weight) and other.again is other.norm and other.also is other.first
    )


def test_what_cannot_be_loaded_or_saved(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not one of these")
    with pytest.raises(ValueError, match="load_quantized_: path must be a safetensors file, got .*model.safetensors: "):
        effvit.load_quantized_(Other(), path)
    trained = Other()
    quantize(trained, qat=True)
    with pytest.raises(
        ValueError,
        match=r"save_quantized: model must have no QATLinear layers \(call effvit.convert_\(model\) first\), got 2 "
        r"\(first, last\)",
    ):
        effvit.save_quantized(trained, path)
    mixed = Other()
    effvit.sparsify_(mixed, skip=["last"], verbose=False)
    quantize(mixed, skip=["first"])
    with pytest.raises(
        ValueError, match=r"no masks \(call effvit.unsparsify_\(model, keep_zeros=True\) first\), got 1"
    ):
        effvit.save_quantized(mixed, path)
    effvit.unsparsify_(mixed, keep_zeros=True)
    effvit.save_quantized(mixed, path)
    with pytest.raises(ValueError, match="load_quantized_: model must have materialised parameters, got meta tensors"):
        effvit.load_quantized_(Other().to("meta"), path)
    loaded = effvit.load_quantized_(Other(), path)
    assert torch.equal(loaded.first.weight, mixed.first.weight) and torch.equal(loaded.last.weight, mixed.last.weight)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (("static",), {}, TypeError, "config must be a QuantizeConfig or None, got str"),
        (({"mode": "static"},), {}, TypeError, "config must be a QuantizeConfig or None, got dict"),
        ((), {"layers": [("0", "int8")]}, TypeError, "layers must be a mapping of patterns to kinds, got list"),
        ((), {"candidates": ()}, ValueError, "candidates must be at least one kind, got none"),
        ((), {"candidates": "int8"}, TypeError, "candidates must be a sequence of kinds, got str"),
        ((), {"layers": {"0": "int8", "*.fc9": "float"}}, ValueError, r"layers\['\*.fc9'\] must be .* got no match"),
    ],
    ids=str,
)
def test_arguments(arguments, options, error, message):
    model = two()
    with pytest.raises(error, match=f"^effvit::quantize_: {message}"):
        effvit.quantize_(model, *arguments, **options)
    assert [type(m) for m in model] == [nn.Linear] * 2


def test_patterns_as_one_string():
    model = nn.ModuleDict({"head": nn.Linear(8, 8), "body": nn.Linear(8, 8), "ad": nn.Linear(8, 8)})
    assert [r.name for r in quantize(copy.deepcopy(model), skip="head*").changed] == ["body", "ad"]
    assert [r.name for r in effvit.sparsify_(model, skip="head*", verbose=False).report.changed] == ["body", "ad"]
    report = quantize(model, layers={"head": "float", "body": "float"}, skip=["head"])  # a match, if a skipped one
    assert [r.name for r in report.changed] == ["ad"]


@pytest.mark.parametrize("kind", ["int8", "sparse24_int8"])
def test_convert_tells_of_a_mask_before_its_end(kind):
    model = two()
    schedule = effvit.sparsify_(model, decay="linear", steps=4, verbose=False)
    schedule.step()
    quantize(model, kind=kind, qat=True)
    other = copy.deepcopy(model)
    assert all("before its mask's decay was 0: 0.75" in r.detail for r in effvit.convert_(model, verbose=False))
    for m in other:
        m.linear.parametrizations.weight[0].decay = 0.0
    assert not any("decay" in r.detail for r in effvit.convert_(other, verbose=False))
