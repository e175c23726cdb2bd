"""effvit.to_integer on timm's ViT, DeiT and Swin: the trained model's integers bit for bit, without floating point."""

import copy
import io

import numpy as np
import pytest
import timm.layers
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import effvit
from effvit import _backends
from effvit.integer_models import calibrate
from effvit.layers import IntegerBits, IntegerSwin, IntegerViT, QuantAct
from effvit.recipes.ivit import OnReference

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
SWIN = {"img_size": 28, "patch_size": 2, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}
MODELS = {
    "class token": lambda: VisionTransformer(**VIT),
    "mean, layer scale, qk norm, registers": lambda: VisionTransformer(
        **VIT, class_token=False, global_pool="avg", init_values=0.1, qk_norm=True, reg_tokens=2
    ),
    "mean with prefix, norm before": lambda: VisionTransformer(
        **VIT, global_pool="avg", pool_include_prefix=True, fc_norm=False, pre_norm=True, no_embed_class=True,
        qkv_bias=False,
    ),
    "no norms behind, no positions": lambda: VisionTransformer(**VIT, final_norm=False, pos_embed="none"),
    "distilled": lambda: VisionTransformerDistilled(**VIT),
    "tanh": lambda: VisionTransformer(**VIT, act_layer="gelu_tanh"),
    "Swin": lambda: SwinTransformer(**SWIN, window_size=7),
    "Swin, padded maps": lambda: SwinTransformer(**SWIN, window_size=4, always_partition=True),
    "Swin, odd maps": lambda: SwinTransformer(**SWIN | {"img_size": 18}, window_size=(3, 5)),
}  # fmt: skip


def made(name, seed=0):
    """Random weights at a scale where every layer matters."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=0.15)
            elif "norm" in key:
                p.add_(torch.randn_like(p) * 0.2)
            else:
                p.add_(torch.randn_like(p) * 0.05)
    return model


def size_of(model):
    return model.patch_embed.img_size


@pytest.fixture(scope="module")
def photograph():
    """[400, 600, 3] of scikit-learn's, normalised, as [3, H, W]."""
    datasets = pytest.importorskip("sklearn.datasets")
    image = torch.tensor(datasets.load_sample_image("china.jpg")).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (image - mean) / std


def crops(photograph, model, count, seed=0):
    h, w = size_of(model)
    g = torch.Generator().manual_seed(seed)
    batch = []
    for _ in range(count):
        y, x = (int(torch.randint(0, n - 150, (), generator=g)) for n in photograph.shape[1:])
        batch.append(photograph[:, y : y + 150, x : x + 150])
    return nn.functional.interpolate(torch.stack(batch), (h, w), mode="bilinear", antialias=True)


@pytest.fixture(params=list(MODELS))
def name(request):
    return request.param


class NoFloats(TorchDispatchMode):
    """No operator has a floating-point tensor, neither as an argument nor as a result."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for t in tree_leaves((args, kwargs, out)):
            if isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex()):
                raise AssertionError(f"{func} has a {t.dtype} tensor")
            assert not isinstance(t, float), f"{func} has a float option"
        return out


def test_a_model(name, photograph):
    """Float as timm; the deployed integers those of training; logits like the float model's; no floats inside."""
    model = made(name)
    images = crops(photograph, model, 6)
    before = copy.deepcopy(model.state_dict())
    integer, report = effvit.to_integer(model, [images[:3], images[3:]], progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(integer, IntegerSwin if "Swin" in name else IntegerViT)

    trained = effvit.prepare_integer(model, [images[:3], images[3:]], progress=False)
    with torch.no_grad():
        wide, other = copy.deepcopy(trained).double().float_(), copy.deepcopy(model).double()
        truth = other(images.double())
        torch.testing.assert_close(wide(images.double()), truth, rtol=1e-9, atol=1e-9)
        q = integer.quantize_input(images)
        assert q.dtype == torch.int8 and q.unique().numel() > 50
        with NoFloats() as watch:
            logits = integer(q)
        assert watch.calls > 20 and logits.dtype == torch.int16 and logits.shape == (6, 10)
        expected = trained.quantised(images)
        assert torch.equal(logits, expected.integers)
        assert float(expected.scale) == integer.output_scale
        torch.testing.assert_close(integer.predict(images), expected.value)
    assert all(not b.is_floating_point() for b in integer.buffers()) and not list(integer.parameters())
    # 8 bits are two decimal digits; with so few channels and layers errors of 1 to 5 % come out
    cosine = nn.functional.cosine_similarity(integer.predict(images).double(), truth, -1)
    assert float(cosine.min()) > 0.997
    assert report.cosine == pytest.approx(float(cosine[:3].mean()), abs=1e-6)


def test_training_and_what_it_deploys(name, photograph):
    """Gradients reach every parameter, steps lower a loss, and the deployed integers are those of training."""
    model = made(name)
    images, target = crops(photograph, model, 8), torch.arange(8)
    trained = effvit.prepare_integer(model, [images], progress=False).train()
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3)
    losses, ranges = [], [m.high.clone() for m in trained.modules() if isinstance(m, QuantAct)]
    for _ in range(4):
        loss = nn.functional.cross_entropy(trained(images), target)
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.parameters())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    moved = [m.high for m in trained.modules() if isinstance(m, QuantAct)]
    assert all(not torch.equal(a, b) for a, b in zip(moved[1:], ranges[1:], strict=True))
    trained.eval()
    for other in (trained, copy.deepcopy(trained)):
        integer, report = effvit.to_integer(other)
        assert report.cosine is None and all(r.error is None for r in report)
        with torch.no_grad():
            assert torch.equal(integer(integer.quantize_input(images)), trained.quantised(images).integers)


def test_gradients_are_the_float_models_nearly(photograph):
    """Straight through: with 16 bits of scores and 8 of the rest a gradient points where the float model's does."""
    model = made("class token").train()
    images = crops(photograph, model, 8)
    trained = effvit.prepare_integer(model, [images], progress=False).eval()
    found = []
    for m in (model, trained):
        nn.functional.cross_entropy(m(images), torch.arange(8)).backward()
        found.append({k: p.grad for k, p in m.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for key, g in found[0].items():
        if "qkv.bias" not in key:  # a bias of keys has no gradient but rounding
            assert float(nn.functional.cosine_similarity(g.flatten(), found[1][key].flatten(), 0)) > 0.9, key


@pytest.mark.parametrize("which", ["distilled", "Swin, padded maps"])
@pytest.mark.parametrize(
    "bits",
    [
        {"weights": 6, "activations": 5, "residual": 12, "scores": 8, "softmax": 4, "gelu": 5, "logits": 10},
        {"softmax": 9, "scores": 11, "gelu": 16},
        {"softmax": 8, "scores": 8},
    ],
    ids=str,
)
def test_other_bits(which, bits, photograph):
    model = made(which)
    images = crops(photograph, model, 4)
    trained = effvit.prepare_integer(model, [images], bits=bits, progress=False)
    with torch.no_grad():
        expected = trained.quantised(images)
    integer, _ = effvit.to_integer(model, [images], bits=IntegerBits(**bits), progress=False)
    assert torch.equal(integer(integer.quantize_input(images)), expected.integers)
    top = 2 ** (bits.get("logits", 16) - 1)
    assert top // 2 < int(expected.integers.abs().max()) <= top
    assert int(integer.quantize_input(images * 10).max()) == 2 ** (bits.get("activations", 8) - 1) - 1


def test_the_watch_for_floats_sees_them(photograph):
    model = made("class token")
    integer, _ = effvit.to_integer(model, [crops(photograph, model, 2)], progress=False)
    with pytest.raises(AssertionError, match="has a torch.float32 tensor"), NoFloats():
        integer.predict(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("which", ["class token", "distilled", "Swin"])
def test_every_backend_gives_the_same_integers(which, photograph):
    model = made(which)
    images = crops(photograph, model, 3)
    integer, _ = effvit.to_integer(model, [images], progress=False)
    x = integer.quantize_input(images)
    with OnReference():
        expected = integer(x)
    before = _backends.isa()
    try:
        for isa in _backends.isas():
            _backends.set_isa(isa)
            assert torch.equal(integer(x), expected), isa
            assert torch.equal(torch.cat([integer(row[None]) for row in x]), expected)
            torch.set_num_threads(2)
            assert torch.equal(integer(x), expected)
            torch.set_num_threads(1)
    finally:
        if before is not None:
            _backends.set_isa(before)


def test_state_dict_pickle_and_copies(name, photograph):
    """What is loaded into a model of other weights gives the same logits; nothing is made of floats by a cast."""
    model = made(name)
    images = crops(photograph, model, 3)
    integer, _ = effvit.to_integer(model, [images], progress=False)
    x = integer.quantize_input(images)
    expected = integer(x)
    other, _ = effvit.to_integer(made(name, 1), [images], progress=False)
    assert not torch.equal(other(x), expected)
    state = io.BytesIO()
    torch.save(integer.state_dict(), state)
    state.seek(0)
    other.load_state_dict(torch.load(state, weights_only=True))
    assert torch.equal(other(x), expected)
    assert (other.input_scale, other.output_scale) == (integer.input_scale, integer.output_scale)
    assert torch.equal(other.quantize_input(images), x)
    pickled = io.BytesIO()
    torch.save(integer, pickled)
    pickled.seek(0)
    for copied in (copy.deepcopy(integer), torch.load(pickled, weights_only=False), copy.deepcopy(integer).half()):
        assert torch.equal(copied(x), expected)
    wrong = integer.state_dict() | {"head.weight" if "Swin" not in name else "head.bias": torch.zeros(10)}
    with pytest.raises(RuntimeError, match="must be torch.int.*call effvit.to_integer"):
        other.load_state_dict(wrong)


def test_state_dict_of_training(name, photograph):
    """Ranges and n come back; names of parameters are timm's, so a float checkpoint loads too."""
    model = made(name)
    images = crops(photograph, model, 3)
    trained = effvit.prepare_integer(model, [images], progress=False)
    keys = {k for k, _ in model.named_parameters()}
    mine = {k for k, _ in trained.named_parameters()}
    assert keys == mine
    other = effvit.prepare_integer(made(name, 1))
    other.load_state_dict(trained.state_dict())
    other.eval()
    with torch.no_grad():
        assert torch.equal(other.quantised(images).integers, trained.quantised(images).integers)
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and not [k for k in missing if k in keys]


def test_compiled(photograph):
    """Without graph breaks, and the same integers."""
    torch._dynamo.reset()
    model = made("Swin, padded maps")
    images = crops(photograph, model, 3)
    integer, _ = effvit.to_integer(model, [images], progress=False)
    x = integer.quantize_input(images)
    compiled = torch.compile(integer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), integer(x))


def test_exported(photograph):
    model = made("class token")
    images = crops(photograph, model, 3)
    integer, _ = effvit.to_integer(model, [images], progress=False)
    x = integer.quantize_input(images)
    program = torch.export.export(integer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    assert torch.equal(program.module()(x[:2]), integer(x[:2]))


@pytest.mark.parametrize("which", ["class token", "Swin"])
def test_traced(which, photograph):
    """By torch.jit, for other batches as well; torch.jit.script is refused in one sentence, whatever the layer."""
    model = made(which)
    images = crops(photograph, model, 3)
    prepared = effvit.prepare_integer(model, [images], progress=False)
    integer, _ = effvit.to_integer(model, [images], progress=False)
    x = integer.quantize_input(images)
    traced = torch.jit.trace(integer, x, check_trace=False)
    for given in (x, x[:1], torch.cat((x, x.flip(-1)))):
        assert torch.equal(traced(given), integer(given))
    for module in (prepared, integer, integer.head, prepared.input_act):
        name = type(module).__name__
        with pytest.raises(RuntimeError, match=rf"^effvit::{name}: torch\.jit\.script cannot .* use torch"):
            torch.jit.script(module)


@pytest.mark.parametrize("which", ["class token", "Swin"])
def test_batches_of_any_size(which, photograph):
    model = made(which)
    integer, _ = effvit.to_integer(model, [crops(photograph, model, 2)], progress=False)
    x = integer.quantize_input(torch.randn(5, 3, *size_of(model)))
    expected = integer(x)
    assert integer(x[:0]).shape == (0, 10) and torch.equal(integer(x[2:3]), expected[2:3])
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(integer(channels_last), expected)


def test_biases_of_pruned_channels(photograph):
    """A LayerNorm bias far beyond its weight: no integer in the norm's own steps."""
    for which in ("class token", "Swin, padded maps"):
        model = made(which)
        images = crops(photograph, model, 4)
        norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
        with torch.no_grad():
            for norm in norms:
                norm.weight[:3] = torch.tensor([1e-9, 0.0, 1e-4])
                norm.bias[:3] = torch.tensor([0.7, -0.4, 1.5])
        integer, report = effvit.to_integer(model, [images], progress=False)
        assert report.cosine > 0.99
        trained = effvit.prepare_integer(model, [images], progress=False)
        with torch.no_grad():
            assert torch.equal(integer(integer.quantize_input(images)), trained.quantised(images).integers)


@pytest.mark.parametrize("method", ["max", "percentile", "mse"])
def test_methods_of_calibration(method, photograph):
    model = made("class token")
    images = crops(photograph, model, 4)
    _, report = effvit.to_integer(model, [images], method=method, percentile=99.0, progress=False)
    assert report.cosine > 0.95
    scales = {r.name: r.scale for r in report if r.kind == "QuantAct"}
    _, usual = effvit.to_integer(model, [images], progress=False)
    changed = [r.name for r in usual if r.kind == "QuantAct" and r.scale != scales[r.name]]
    assert bool(changed) == (method != "max")
    assert all(scales[r.name] == r.scale for r in usual if r.kind == "QuantAct" and r.bits == 16)
    assert all(scales[r.name] <= r.scale * 1.01 for r in usual if r.kind == "QuantAct")


def test_report(photograph, capsys):
    """Every layer by name, with what was measured; the numbers against a computation by hand."""
    model = made("class token")
    images = crops(photograph, model, 4)
    _, report = effvit.to_integer(model, [images], verbose=True, progress=True)
    shown = capsys.readouterr()
    assert "calibrating" in shown.err
    assert str(report) == shown.out.rstrip() and "logits: error" in shown.out and "n = " in shown.out
    rows = {r.name: r for r in report}
    assert len(rows) == len(report) and {"blocks.1.attn.qkv", "blocks.0.mlp.act", "logits_act"} <= rows.keys()
    trained = effvit.prepare_integer(model, [images], progress=False)
    weight = model.blocks[1].attn.qkv.weight.detach().double().numpy()
    step = np.abs(weight).max(1, keepdims=True) / 127
    error = np.linalg.norm(np.rint(weight / step) * step - weight) / np.linalg.norm(weight)
    assert rows["blocks.1.attn.qkv"].weight_error == pytest.approx(error, rel=1e-6)
    with torch.no_grad():
        q = trained.input_act(images)
        assert rows["input_act"].saturated == float(((q.integers >= 127) | (q.integers <= -128)).double().mean())
        expected = float((q.value - images).norm() / images.norm())
        assert rows["input_act"].error == pytest.approx(expected, rel=1e-5) and rows["input_act"].bits == 8
        logits = trained(images).double(), model(images).double()
    assert report.error == pytest.approx(float((logits[0] - logits[1]).norm() / logits[1].norm()), rel=1e-4)
    assert all(r.n is not None for r in report if r.kind in ("IntSoftmax", "IntGELU"))
    assert all(r.error < 0.2 and r.scale > 0 for r in report)


def test_training_alone_finds_ranges_and_n(photograph):
    """A model that was not calibrated is as near to the float one as one that was."""
    model = made("class token")
    images = crops(photograph, model, 4)
    models = effvit.prepare_integer(model, [images], progress=False), effvit.prepare_integer(model).train()
    with torch.no_grad():
        for _ in range(3):
            models[1](images)
        truth = model(images)
        calibrated, trained = (float((m.eval()(images) - truth).norm() / truth.norm()) for m in models)
    assert trained < 2 * calibrated < 0.3


def test_bits_are_those_of_the_state_dict(photograph):
    """Loaded into a model of other bits, deployed or in training."""
    model = made("mean, layer scale, qk norm, registers")
    images = crops(photograph, model, 3)
    bits = {"weights": 6, "activations": 5, "residual": 12, "scores": 8, "softmax": 4, "gelu": 5, "logits": 10}
    narrow, wide = (effvit.prepare_integer(model, [images], bits=b, progress=False) for b in (bits, None))
    deployed, other = narrow.deployed(), wide.deployed()
    x = deployed.quantize_input(images)
    expected = deployed(x)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(deployed.state_dict())
    assert torch.equal(other(x), expected)
    wide.load_state_dict(narrow.state_dict())
    assert torch.equal(wide.deployed()(x), expected)
    with torch.no_grad():
        assert torch.equal(wide.eval().quantised(images).integers, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_training_in_other_dtypes(dtype, photograph):
    """A step of training, and the integers that it deploys."""
    model = made("Swin, padded maps")
    images = crops(photograph, model, 2)
    trained = effvit.prepare_integer(model, [images], progress=False).to(dtype).train()
    images = images.to(dtype)
    y = trained(images)
    y.float().square().mean().backward()
    assert y.dtype == dtype and all(torch.isfinite(p.grad).all() for p in trained.parameters())
    torch.optim.SGD(trained.parameters(), 1e-3).step()
    trained.eval()
    with torch.no_grad():
        integer = trained.deployed()
        assert torch.equal(integer(integer.quantize_input(images)), trained.quantised(images).integers)
        error = (trained(images).double() - model.double()(images.double())).norm() / y.double().norm()
    assert float(error) < 0.2


def test_sparsified_models(photograph):
    """The integers are those of the weights that the masks leave, and what is frozen stays so."""
    model = made("class token")
    images = crops(photograph, model, 2)
    model.requires_grad_(False).head.requires_grad_(True)
    effvit.sparsify_(model, verbose=False)
    masked, _ = effvit.to_integer(model, [images], progress=False)
    prepared = effvit.prepare_integer(model)
    effvit.unsparsify_(model, keep_zeros=True, verbose=False)
    expected, _ = effvit.to_integer(model, [images], progress=False)
    assert all(torch.equal(t, expected.state_dict()[k]) for k, t in masked.state_dict().items())
    assert int(masked.blocks[0].mlp.fc1.weight.view(-1, 4).ne(0).sum(1).max()) == 2
    for m in (prepared, effvit.prepare_integer(model)):
        assert {n: p.requires_grad for n, p in m.named_parameters()} == {
            n: n.startswith("head.") for n, _ in model.named_parameters()
        }


def test_activations_that_are_not_finite(photograph):
    """The first of them is named."""
    model = made("class token")
    images = crops(photograph, model, 2)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[3] = torch.nan
    for method in ("max", "mse"):
        with pytest.raises(ValueError, match="calibration must be .* finite, got NaN or infinity in blocks.1.mlp.fc1_"):
            effvit.to_integer(model, [images], method=method, progress=False)


class Gate(VisionTransformer):
    pass


class Other(nn.Module):
    """As torchvision's, of timm's name alone."""


Other.__name__ = "VisionTransformer"


def swap(change):
    def make():
        model = made("class token")
        change(model)
        return model

    return make


def set_of(path, value):
    def change(model):
        owner, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(owner) if owner else model, attribute, value)

    return swap(change)


REFUSED = {
    "model must be timm's": lambda: nn.Sequential(nn.Linear(4, 4)),
    "model must be timm's.*got Gate": lambda: Gate(**VIT),
    "model must be timm's.*got VisionTransformer$": Other,
    r"blocks.1.mlp.act must be GELU": set_of("blocks.1.mlp.act", nn.SiLU()),
    r"blocks.0.mlp must be timm's Mlp": set_of("blocks.0.mlp", timm.layers.GluMlp(48, 96)),
    r"blocks.0.norm2 must be a LayerNorm, got RmsNorm": set_of("blocks.0.norm2", timm.layers.RmsNorm(48)),
    r"blocks.1.attn must be timm's Attention": set_of("blocks.1.attn", nn.Identity()),
    r"blocks.1.attn.qkv must be an nn.Linear": set_of("blocks.1.attn.qkv", nn.Identity()),
    r"patch_embed.proj must be a convolution of patches": set_of("patch_embed.proj", nn.Conv2d(3, 48, 8, 4)),
    r"patch_embed.proj must be a convolution without padding": set_of(
        "patch_embed.proj", nn.Conv2d(3, 48, 8, 8, padding=1)
    ),
    r"global_pool must be token or avg, got 'max'": lambda: VisionTransformer(**VIT, global_pool="max"),
    r"model must be of a fixed image size": lambda: VisionTransformer(**VIT, dynamic_img_size=True),
    r"attn_pool must be none": lambda: VisionTransformer(**VIT, global_pool="map"),
    r"blocks.0.attn must be timm's Attention without a gate": swap(
        lambda m: setattr(m.blocks[0].attn, "gate", nn.Linear(48, 48))
    ),
    r"head must be an nn.Linear, got Identity": lambda: VisionTransformer(**VIT | {"num_classes": 0}),
    r"head must be a ClassifierHead": lambda: SwinTransformer(**SWIN, global_pool="max"),
    r"layers.0.blocks.0 must be of a fixed image size": lambda: SwinTransformer(**SWIN, dynamic_img_size=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_integers_is_named(message):
    with pytest.raises(ValueError, match=f"effvit::to_integer: {message}"):
        effvit.to_integer(REFUSED[message](), [torch.zeros(1, 3, 32, 32)], progress=False)


def test_errors(photograph):
    model = made("class token")
    images = crops(photograph, model, 2)
    with pytest.raises(ValueError, match="to_integer: calibration must be batches"):
        effvit.to_integer(model)
    with pytest.raises(ValueError, match="to_integer: calibration must be at least one batch, got none"):
        effvit.to_integer(model, [], progress=False)
    with pytest.raises(ValueError, match="to_integer: method must be"):
        effvit.to_integer(model, [images], method="entropy", progress=False)
    with pytest.raises(ValueError, match="to_integer: percentile must be"):
        effvit.to_integer(model, [images], percentile=0.0, progress=False)
    with pytest.raises(ValueError, match="to_integer: batches must be"):
        effvit.to_integer(model, [images], batches=0, progress=False)
    with pytest.raises(ValueError, match="IntegerBits: weights must be"):
        effvit.to_integer(model, [images], bits={"weights": 9}, progress=False)
    integer, _ = effvit.to_integer(model, [images, images], batches=1, progress=False)
    with pytest.raises(TypeError, match="IntegerViT: x must be int8, got torch.float32"):
        integer(images)
    with pytest.raises(ValueError, match=r"IntegerViT: x must be \[B, 3, 32, 32\], made by quantize_input, got"):
        integer(torch.zeros(1, 3, 16, 32, dtype=torch.int8))
    with pytest.raises(TypeError, match="IntegerViT: images must be floating point"):
        integer.quantize_input(torch.zeros(1, 3, 32, 32, dtype=torch.int32))
    with pytest.raises(TypeError, match="IntegerAttention: x must be int8"):
        integer.blocks[0].attn(torch.zeros(1, 4, 48, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"IntegerMLP: x must be \[..., 48\]"):
        integer.blocks[0].mlp(torch.zeros(1, 4, 47, dtype=torch.int8))
    trained = effvit.prepare_integer(model)
    with pytest.raises(ValueError, match="prepare_integer: model must be one of timm's"):
        effvit.prepare_integer(trained)
    for options in ({"bits": {}}, {"batches": 5}, {"method": "mse"}, {"percentile": 99.0}):
        (option,) = options
        with pytest.raises(ValueError, match=f"to_integer: {option} must be left out"):
            effvit.to_integer(trained, **options)
    with pytest.raises(TypeError, match="bits must be IntegerBits, a mapping of its fields or None, got int"):
        effvit.to_integer(model, [images], bits=8)
    with pytest.raises(ValueError, match="a name in bits must be one of weights, activations, .*, got 'weight'"):
        effvit.prepare_integer(model, bits={"weight": 8})
    with pytest.raises(RuntimeError, match="QuantAct: has seen no data"):
        effvit.to_integer(trained)
    with pytest.raises(ValueError, match="QuantViT: images must be"):
        trained(torch.zeros(1, 3, 16, 32))


def test_batches_as_loaders_give_them(photograph):
    model = made("class token")
    images = crops(photograph, model, 4)
    expected = effvit.to_integer(model, [images], progress=False)[0].state_dict()
    for batches in ([(images, torch.zeros(4))], [{"image": images, "label": None}], iter([images]), [images, None]):
        limit = 1 if isinstance(batches, list) and len(batches) == 2 else None
        found = effvit.to_integer(model, batches, batches=limit, progress=False)[0].state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in found.items() if v is not None)
    trained = effvit.prepare_integer(model)
    calibrate(trained, [images], bar=False)
    assert not any(m.training for m in trained.modules()) and trained.input_act.quantising
