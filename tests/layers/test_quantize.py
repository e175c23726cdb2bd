"""effvit.quantize_, convert_, sparsify_ and their ways back, on models of timm: which layer becomes what, and files."""

import builtins
import copy
import gc
import io
import weakref

import pytest
import torch
from layer_suite import randomise, tokens
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import effvit
from effvit import _progress
from effvit._accuracy import assert_bitwise_equal, assert_close_to_truth
from effvit.layers import Int8Linear, OutlierLinear, QATLinear, Sparse24Int8Linear
from effvit.quantize import ORIGINAL, Report, choose, smoothing


def vit(**kwargs):
    torch.manual_seed(0)
    return excite(
        VisionTransformer(
            **{"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2,
               "num_heads": 2, **kwargs}
        )
    ).eval()  # fmt: skip


def swin():
    torch.manual_seed(0)
    return excite(
        SwinTransformer(
            img_size=8, patch_size=1, in_chans=1, num_classes=10, embed_dim=16, depths=(2, 2), num_heads=(2, 4),
            window_size=4,
        )
    ).eval()  # fmt: skip


def excite(model):
    """Norms and biases that matter, some channels much larger than others."""
    for m in model.modules():
        if isinstance(m, nn.LayerNorm):
            randomise(m)
            with torch.no_grad():
                m.weight[:3].mul_(8)
        elif isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
    return model


MODELS = {"vit": vit, "swin": swin}
IMAGES = tokens(6, 1, 8, 8)


def quantize(model, **options):
    return effvit.quantize_(model, verbose=False, progress=False, **options)


def data(n=2):
    return [(tokens(6, 1, 8, 8, seed=10 + i), torch.zeros(6)) for i in range(n)]


def snapshot(model):
    """All that a user could hold on to: modules, their parameters, order, values and modes."""
    modules = [(name, m, m.training, type(m)) for name, m in model.named_modules()]
    tensors = [(name, t, t.detach().clone()) for name, t in (*model.named_parameters(), *model.named_buffers())]
    return modules, tensors, list(model.state_dict())


def assert_restored(model, before):
    modules, tensors, keys = before
    now = snapshot(model)
    assert len(now[0]) == len(modules) and len(now[1]) == len(tensors) and now[2] == keys
    for (name, m, mode, cls), (n, other, mode_now, cls_now) in zip(modules, now[0], strict=True):
        assert (name, mode, cls) == (n, mode_now, cls_now) and m is other
    for (name, t, value), (n, other, _) in zip(tensors, now[1], strict=True):
        assert name == n and t is other and torch.equal(t, value)


def error(y, truth):
    return float((y - truth).detach().norm() / truth.detach().norm())


# ---- reversal --------------------------------------------------------------------------------------------------------

CONFIGS = {
    "dynamic": {},
    "static": {"mode": "static", "calibration": data()},
    "smooth": {"smooth": 0.5, "calibration": data()},
    "static_smooth": {"mode": "static", "smooth": 0.5, "calibration": data()},
    "outlier": {"kind": "outlier", "threshold": 4.0},
    "outlier_fixed": {
        "kind": "outlier",
        "threshold": 4.0,
        "keep_weight": False,
        "mode": "static",
        "calibration": data(),
    },
    "sparse": {"kind": "sparse24_int8", "algorithm": "transposable"},
    "mixed": {"layers": {"*.qkv": "outlier", "*.fc1": "sparse24_int8", "*.fc2": "float"}},
    "auto": {"kind": "auto", "budget": 0.22, "calibration": data()},
    "qat": {"qat": True},
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_there_and_back(make, options):
    """Close to the float model, by the accuracy that int8 has; then the very same modules again."""
    model = make()
    original, before, y = copy.deepcopy(model), snapshot(model), model(IMAGES)
    report = quantize(model, **options)
    pruned = copy.deepcopy(original)  # the float model with the weights that 2:4 layers have
    sparse = {n: m for n, m in model.named_modules() if isinstance(m, Sparse24Int8Linear)}
    with torch.no_grad():
        for name, m in sparse.items():
            assert ((m.plain_weight().unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
            pruned.get_submodule(name).weight.copy_(m.plain_weight() * m.weight_scale[:, None])
    z = model(IMAGES)
    assert 0 < error(z, pruned(IMAGES)) < 0.1
    assert len(report.changed) >= 6 and all(0 <= r.weight_error < (0.6 if sparse else 0.02) for r in report.changed)
    assert [r.output_error is not None for r in report.changed] == ["calibration" in options] * len(report.changed)
    assert set(effvit.unquantize_(model, verbose=False)) >= {r.name for r in report.changed}
    assert_restored(model, before)
    assert_bitwise_equal(model(IMAGES), y)


def test_what_becomes_of_which_layer():
    model = vit()
    report = quantize(
        model, layers={"blocks.0.attn.*": "outlier", "blocks.?.mlp.fc1": "sparse24_int8", "*.fc2": "float"}
    )  # fmt: skip
    block, other = model.blocks
    assert type(block.attn.qkv) is type(block.attn.proj) is OutlierLinear
    assert type(other.attn.qkv) is type(other.attn.proj) is Int8Linear
    assert type(block.mlp.fc1) is type(other.mlp.fc1) is Sparse24Int8Linear
    assert type(block.mlp.fc2) is nn.Linear and type(model.head) is nn.Linear
    assert {(r.name, r.detail) for r in report.unchanged} == {
        ("head", "skipped by the pattern 'head'"), ("blocks.0.mlp.fc2", "kind float"),
        ("blocks.1.mlp.fc2", "kind float"),
    }  # fmt: skip
    text = str(report)
    assert "blocks.0.attn.qkv" in text and "KiB before" in text and "not quantised: 2 x torch.Linear" in text
    again = quantize(model)
    assert {r.name for r in again.changed} == {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}
    assert any(r.detail == "already quantised or sparse" for r in again.unchanged)
    row = next(r for r in report.changed if r.name == "blocks.1.attn.qkv")
    assert row.bytes_before == 4 * (32 * 96 + 96) and row.bytes_after == 32 * 96 + 2 * 4 * 96
    assert report.bytes_after < report.bytes_before


def test_layers_that_share_hook_or_subclass():
    class Other(nn.Linear):
        pass

    shared, calls = nn.Linear(8, 8), []
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, Other(8, 8)), "c": nn.Linear(8, 8)})
    model["c"].register_forward_hook(lambda m, args, out: calls.append(type(m)))
    report = quantize(model)
    assert model["a"] is model["b"][0] and type(model["a"]) is Int8Linear and type(model["b"][1]) is Other
    assert [r.detail for r in report.unchanged] == ["a subclass of Linear, which may compute something else"]
    model["c"](tokens(2, 8))
    assert calls == [Int8Linear]
    effvit.unquantize_(model)
    assert model["a"] is model["b"][0] is shared


def test_what_has_two_places_is_not_fused():
    """An fc1, an activation or a norm that two blocks share would be changed for both by what is meant for one."""
    model = vit()
    first, second = model.blocks
    second.mlp.fc1, second.norm1 = first.mlp.fc1, first.norm1
    y = model(IMAGES)
    quantize(model, smooth=0.5, calibration=data())
    assert first.mlp.fc1 is second.mlp.fc1 and first.mlp.fc1.activation == "none" and type(first.mlp.act) is nn.GELU
    norms = [first.norm1, first.norm2, second.norm2]  # norm1 is read by two qkv, fc1 reads two norms
    assert first.norm1 is second.norm1 and not any(ORIGINAL in vars(m) for m in norms)
    assert error(model(IMAGES), y) < 0.1


def test_what_is_never_called_stays_float():
    """A layer whose weight something else multiplies by hand needs its floats."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(self.used(x), *self.read.parameters())

    model = Functional()
    report = quantize(model, calibration=[tokens(3, 8)])
    assert type(model.used) is Int8Linear and type(model.read) is nn.Linear
    assert "never called" in report.unchanged[0].detail
    model(tokens(3, 8))


def test_torchs_own_encoder_layer():
    """Its fast path hands the weights of its linear layers to a kernel for floats."""
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    report = quantize(model)
    assert [r.name for r in report.changed] == ["0"]
    assert sum("reads its weight itself" in r.detail for r in report.unchanged) == 2
    with torch.inference_mode():
        assert model(tokens(2, 5, 8)).shape == (2, 5, 8)


# ---- calibration, smoothing, fusing ----------------------------------------------------------------------------------


def test_static_scales_and_fused_mlp():
    """input_scale is the largest |x| seen / 127; fc1 has the GELU and hands on int8 in steps of fc2's scale."""
    model = vit()
    seen = {}

    def watch(name):
        def hook(m, args):
            seen[name] = max(seen.get(name, 0.0), float(args[0].abs().max()))

        return hook

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in model.named_modules() if n.endswith(("qkv", "fc2"))]
    with torch.no_grad():
        for x, _ in data():
            model(x)
    for h in handles:
        h.remove()
    y = model(IMAGES)
    report = quantize(model, mode="static", calibration=data())
    for name, largest in seen.items():
        torch.testing.assert_close(float(model.get_submodule(name).input_scale), largest / 127)
    mlp = model.blocks[0].mlp
    assert mlp.fc1.activation == "gelu" and isinstance(mlp.act, nn.Identity)
    assert float(mlp.fc1.output_scale) == float(mlp.fc2.input_scale)
    with torch.no_grad():
        assert mlp.fc1(tokens(2, 32)).dtype == torch.int8
    assert "gelu fused, int8 out" in next(r.detail for r in report.changed if r.name == "blocks.0.mlp.fc1")
    assert error(model(IMAGES), y) < 0.1
    separate = vit()
    quantize(separate, mode="static", calibration=data(), fuse=False)
    assert type(separate.blocks[0].mlp.act) is nn.GELU and separate.blocks[0].mlp.fc1.output_scale is None
    assert error(separate(IMAGES), model(IMAGES)) < 0.05


@pytest.mark.parametrize("change", ["tanh", "dropout", "norm", "subclass"])
def test_mlps_that_are_not_fused_or_only_half(change):
    model = vit()
    mlp = model.blocks[0].mlp
    if change == "tanh":
        mlp.act = nn.GELU("tanh")
    elif change == "dropout":
        mlp.drop1 = nn.Dropout(0.1)
    elif change == "norm":
        mlp.norm = nn.LayerNorm(128)
    else:
        mlp.__class__ = type("Mlp", (type(mlp),), {})
    model.eval()
    y = model(IMAGES)
    quantize(model, mode="static", calibration=data())
    assert (mlp.fc1.activation == "gelu") == (change in ("dropout", "norm"))
    assert mlp.fc1.output_scale is None and error(model(IMAGES), y) < 0.15
    model.train()
    model(IMAGES)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_smoothing_moves_scale(make):
    """The factors are SmoothQuant's; without rounding the model with factors in its norms is the same model."""
    model = make()
    original = copy.deepcopy(model)
    report = quantize(model, smooth=0.5, calibration=data(), fuse=False)
    inside = [r.name for r in report.changed if r.detail.endswith(", smooth")]
    in_norm = [r.name for r in report.changed if r.detail.endswith("smooth in the norm")]
    assert all(n.endswith(("proj", "fc2")) for n in inside) and len(inside) == len(in_norm) - (make is swin)
    folded = 0
    for name, m in original.double().named_modules():
        now = model.get_submodule(name)
        if type(now) is Int8Linear:  # put the float weights of the smoothed layer in its place
            parts = vars(now)[ORIGINAL][0]
            factors = parts.weight.new_ones(now.in_features) if now.smooth is None else now.smooth.reciprocal()
            replaced = copy.deepcopy(m)
            with torch.no_grad():
                w = now.plain_weight() * now.weight_scale[:, None] / parts.weight.detach()
                column = w.median(0).values if now.smooth is None else factors
                replaced.weight.mul_(column.double())
                folded += now.smooth is None
            replaced = nn.Sequential(Divide(factors), replaced) if now.smooth is not None else replaced
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, replaced)
    assert folded == len(in_norm) > 0
    # the factors in the norms were read back from rounded weights: medians of them, right to a few per mille
    assert error(model.double()(IMAGES.double()), original(IMAGES.double())) < 0.02


class Divide(nn.Module):
    def __init__(self, factors):
        super().__init__()
        self.register_buffer("factors", factors.double())

    def forward(self, x):
        return x / self.factors


def test_smoothing_formula_and_gain():
    w, largest = tokens(6, 5), torch.tensor([0.0, 1.0, 4.0, 100.0, 0.5])
    w[:, 4] = 0
    s = smoothing(w, largest, 0.75)
    expected = [1.0, *(float(largest[j]) ** 0.75 / float(w[:, j].abs().max()) ** 0.25 for j in (1, 2, 3)), 1.0]
    torch.testing.assert_close(s, torch.tensor(expected))
    wide = nn.Sequential(nn.Linear(32, 16))
    x = tokens(64, 32) * torch.tensor([50.0] + [1.0] * 31)
    with torch.no_grad():
        wide[0].weight[:, 0] /= 50
    errors = []
    for smooth in (None, 0.5):
        model = copy.deepcopy(wide)
        report = quantize(model, mode="static", calibration=[x], smooth=smooth)
        errors.append(report.changed[0].output_error)
    assert errors[1] < 0.4 * errors[0]


def test_calibration_leaves_no_trace():
    """Modes, hooks and BatchNorm statistics are as before; any kind of batch; no more batches than asked for."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    running = model[1].running_mean.clone()
    taken = []

    def loader():
        for i in range(5):
            taken.append(i)
            yield ({"input": tokens(4, 8, seed=i)}, tokens(4, 8, seed=i), [tokens(4, 8, seed=i), 1])[i % 3]

    quantize(model, mode="static", calibration=loader(), batches=3)
    assert taken == [0, 1, 2] and model.training and model[0].training and model[2].training
    assert torch.equal(model[1].running_mean, running) and not model[0]._forward_pre_hooks
    largest = max(float(tokens(4, 8, seed=i).abs().max()) for i in range(3))
    torch.testing.assert_close(float(model[0].input_scale), largest / 127)


@pytest.mark.parametrize("tqdm", [True, False])
def test_progress(tqdm, monkeypatch, capsys):
    if tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setattr(_progress.importlib.util, "find_spec", lambda name: None)
    assert list(_progress.progress(range(3), "calibrating")) == [0, 1, 2]
    shown = capsys.readouterr()
    assert "calibrating: " in shown.err and "/3" in shown.err and not shown.out
    assert list(_progress.progress(iter(range(3)), "calibrating", enabled=False)) == [0, 1, 2]
    assert not capsys.readouterr().err


# ---- the choice by errors --------------------------------------------------------------------------------------------


def test_choice_within_a_budget():
    """Small cases: the cheapest loss for what it saves is taken first, and an impossible budget is an error."""
    options = {
        "a": {"float": (100, 0.0), "int8": (25, 0.01), "sparse24_int8": (15, 0.5)},
        "b": {"float": (100, 0.0), "int8": (25, 0.2), "sparse24_int8": (15, 0.3)},
        "c": {"float": (1000, 0.0), "int8": (250, 0.02)},
    }
    assert choose(options, 1200) == {"a": "float", "b": "float", "c": "float"}
    assert choose(options, 1199) == {"a": "float", "b": "float", "c": "int8"}
    assert choose(options, 400) == {"a": "int8", "b": "float", "c": "int8"}
    assert choose(options, 300) == {"a": "int8", "b": "int8", "c": "int8"}
    assert choose(options, 290) == {"a": "int8", "b": "sparse24_int8", "c": "int8"}
    assert choose(options, 280) == {"a": "sparse24_int8", "b": "sparse24_int8", "c": "int8"}
    with pytest.raises(ValueError, match=r"effvit::quantize_: budget must be at least .*280, got 279"):
        choose(options, 279)


@pytest.mark.parametrize("of", ["size", "latency"])
def test_auto_on_a_model(of):
    model = vit()
    report = quantize(
        model, kind="auto", budget=0.5 if of == "size" else 1.0, budget_of=of, calibration=data(1),
        candidates=("float", "int8"),
    )  # fmt: skip
    if of == "size":
        before = report.bytes_before + sum(
            effvit.quantize.size_of(model.get_submodule(r.name)) for r in report.unchanged if "budget" in r.detail
        )
        left = before - report.bytes_before
        assert report.bytes_after + left <= 0.5 * before and 0 < len(report.changed) < 8
        worst = max(r.output_error for r in report.changed)
        assert worst < 0.03
    model(IMAGES)


# ---- training --------------------------------------------------------------------------------------------------------


def test_sparsify_there_and_back():
    model = vit()
    before, y = snapshot(model), model(IMAGES)
    result = effvit.sparsify_(model, verbose=False)
    weight = model.blocks[0].mlp.fc1.weight
    assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()
    assert len(result) == 9 and "2:4 magnitude" in str(result)
    assert 0.2 < result.report.changed[0].weight_error < 0.6
    again = effvit.sparsify_(model, verbose=False)
    assert not again.report.changed and any(r.detail == "already sparse" for r in again)
    assert len(effvit.unsparsify_(model, verbose=False)) == 8
    assert_restored(model, before)
    assert_bitwise_equal(model(IMAGES), y)
    effvit.sparsify_(model, "transposable", verbose=False)
    transposed = model.blocks[0].mlp.fc1.weight.detach().mT
    assert ((transposed.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()
    masked = model(IMAGES)
    effvit.unsparsify_(model, keep_zeros=True, verbose=False)
    assert_bitwise_equal(model(IMAGES), masked)


def test_decay_and_gradient():
    """Masked weights count by a factor that falls to 0; their gradient is g + strength * w, that of the others g."""
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    dense = model[0].weight
    mask = torch.zeros(4, 8)
    for n, row in enumerate(dense.detach().abs()):
        for start in (0, 4):
            mask[n, start + row[start : start + 4].topk(2).indices] = 1
    schedule = effvit.sparsify_(model, decay="linear", steps=4, strength=0.1, verbose=False)
    for factor in (1.0, 0.75, 0.5, 0.25, 0.0, 0.0):
        assert schedule.decay == factor
        torch.testing.assert_close(model[0].weight, dense * (mask + factor * (1 - mask)))
        schedule.step()
    x = tokens(3, 8)
    model(x).sum().backward()
    g = x.sum(0).expand(4, 8)
    torch.testing.assert_close(dense.grad, g + 0.1 * (1 - mask) * dense.detach())
    effvit.unsparsify_(model)
    schedule = effvit.sparsify_(model, decay="exponential", steps=3, verbose=False)
    decays = [schedule.decay] + [schedule.step() for _ in range(4)]
    torch.testing.assert_close(torch.tensor(decays), torch.tensor([1.0, 0.1, 0.01, 0.0, 0.0]))


@pytest.mark.parametrize("masks", [True, False])
def test_train_and_convert(masks):
    """Masks and rounding in training; the int8 model that comes out computes what was trained."""
    model = vit()
    parameters = list(model.parameters())
    if masks:
        effvit.sparsify_(model, verbose=False)
    quantize(model, qat=True, kind="sparse24_int8")
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    labels, losses = torch.arange(6), []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(IMAGES), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    trained = model(IMAGES)
    report = effvit.convert_(model, verbose=False)
    assert len(report.changed) == 8 and not any(isinstance(m, QATLinear) for m in model.modules())
    assert model.blocks[0].mlp.fc1.activation == "gelu" and type(model.blocks[0].attn.qkv) is Sparse24Int8Linear
    assert error(model(IMAGES), trained) < 0.01  # a rounding difference may become one of a step
    effvit.unquantize_(model, verbose=False)
    if masks:
        effvit.unsparsify_(model, verbose=False)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [o for n, o in CONFIGS.items() if n not in ("qat", "auto")], ids=str)
def test_files(options, tmp_path):
    pytest.importorskip("safetensors")
    model = swin()
    quantize(model, **options)
    effvit.save_quantized(model, tmp_path / "model.safetensors")
    torch.manual_seed(5)
    other = excite(copy.deepcopy(effvit_float(model))).eval()
    assert effvit.load_quantized_(other, tmp_path / "model.safetensors") is other
    assert_bitwise_equal(other(IMAGES), model(IMAGES))
    with pytest.raises(ValueError, match=r"unquantize_: model must have kept its float layers .* got \d+ without"):
        effvit.unquantize_(other)
    small = vit()
    with pytest.raises(ValueError, match=r"load_quantized_: model must have a Linear layers.0.* got no such module"):
        effvit.load_quantized_(small, tmp_path / "model.safetensors")


def effvit_float(model):
    model = copy.deepcopy(model)
    effvit.unquantize_(model, verbose=False)
    return model


def test_state_dict_into_a_model_of_the_same_configuration():
    model, other = vit(), vit(embed_dim=32)
    quantize(model, mode="static", calibration=data())
    quantize(other, mode="static", calibration=data(1))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert_bitwise_equal(other(IMAGES), model(IMAGES))


def test_without_safetensors(monkeypatch, tmp_path):
    model, imported = vit(), builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    quantize(model)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"effvit.save_quantized: safetensors must be installed \(pip install"):
        effvit.save_quantized(model, tmp_path / "model.safetensors")


# ---- compiled, patched -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_compiled_and_exported(mode):
    model = vit()
    quantize(model, mode=mode, calibration=data())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
        assert error(program.module()(tokens(3, 1, 8, 8)), model(tokens(3, 1, 8, 8))) < 0.02
    calls = {n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert torch.ops.effvit.int8_linear.default in calls and torch.ops.aten.gelu.default not in calls
    lowered = program.run_decompositions(effvit.decompositions())
    names = {n.target.namespace for n in lowered.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    assert names == {"aten"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx(dynamo, mode, tmp_path):
    """The integers are plain ones there, at any batch size."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file = vit(), tmp_path / "model.onnx"
    quantize(model, mode=mode, calibration=data())
    kind = {"dynamic_shapes": {"x": {0: "batch"}}} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    with torch.no_grad():
        torch.onnx.export(model, (IMAGES,), str(file), dynamo=dynamo, input_names=["x"], **kind)
        session = onnxruntime.InferenceSession(str(file))
        for x in (IMAGES, tokens(3, 1, 8, 8, seed=2)):
            (result,) = session.run(None, {"x": x.numpy()})
            assert error(torch.from_numpy(result), model(x)) < 0.02  # where a rounding difference becomes a step


def test_with_patch():
    """effvit.patch before and after: attention and linear layers are each other's neighbours, not rivals."""
    model = swin()
    y = model(IMAGES)
    effvit.patch(model, verbose=False)
    report = quantize(model, smooth=0.5, calibration=data())
    assert any("smooth in the norm" in r.detail for r in report.changed)
    assert error(model(IMAGES), y) < 0.05
    effvit.unquantize_(model)
    assert_close_to_truth(model(IMAGES), copy.deepcopy(model).double()(IMAGES.double()), y)
    effvit.unpatch(model)
    assert_bitwise_equal(model(IMAGES), y)


def test_a_copy_is_a_model_of_its_own():
    model = vit()
    quantize(model)
    other = copy.deepcopy(model)
    effvit.unquantize_(other)
    assert type(other.blocks[0].mlp.fc1) is nn.Linear and type(model.blocks[0].mlp.fc1) is Int8Linear
    assert other.blocks[0].mlp.fc1 is not vars(model.blocks[0].mlp.fc1)[ORIGINAL][0]


def test_originals_that_are_not_kept():
    model = vit()
    fc1 = weakref.ref(model.blocks[0].mlp.fc1)
    quantize(model, keep_original=False)
    gc.collect()
    assert fc1() is None
    with pytest.raises(ValueError, match=r"unquantize_: model must have kept its float layers .* got \d+ without"):
        effvit.unquantize_(model)


def test_gradients_of_a_static_model():
    """Straight through int8 between fc1 and fc2 too: near those of the float model, in every parameter that is left."""
    model = vit()
    original = copy.deepcopy(model)
    quantize(model, mode="static", calibration=data())
    for m in (model, original):
        m(IMAGES).square().sum().backward()
    for name, p in model.named_parameters():
        assert error(p.grad, dict(original.named_parameters())[name].grad) < 0.25, name


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "fast"}, "mode must be one of dynamic, static, got 'fast'"),
        (
            {"kind": "int4"},
            "kind must be one of int8, sparse24_int8, block_sparse_int8, block_sparse, outlier, float, auto, got "
            "'int4'",
        ),
        ({"layers": {"*fc1": "int4"}}, r"layers\['\*fc1'\] must be one of"),
        ({"mode": "static"}, "calibration must be batches of data, for mode static, got None"),
        ({"smooth": 0.5}, "calibration must be batches of data, for smooth, got None"),
        ({"smooth": 1.5, "calibration": data()}, "smooth must be between 0 and 1, got 1.5"),
        ({"kind": "auto", "calibration": data()}, "budget must be given with kind auto, got None"),
        ({"budget": 0.5}, "budget must be None without a kind auto, got 0.5"),
        ({"kind": "auto", "budget": 2.0, "calibration": data()}, "budget must be above 0 and at most 1, got 2.0"),
        ({"kind": "auto", "budget": 0.01, "calibration": data()}, "budget must be at least what the cheapest kinds"),
        (
            {"kind": "outlier", "qat": True},
            "kind must be one of int8, sparse24_int8, block_sparse_int8 with qat, got outlier",
        ),
        ({"algorithm": "random"}, "algorithm must be one of magnitude, transposable"),
        ({"config": effvit.QuantizeConfig(), "mode": "static"}, "config must be None where its fields are given"),
    ],
    ids=str,
)
def test_bad_configurations(options, message):
    """The message names the argument, and the model is as it was."""
    model = vit()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"^effvit::quantize_: {message}"):
        effvit.quantize_(model, verbose=False, **options)
    assert_restored(model, before)


def test_bad_models():
    for function in (effvit.quantize_, effvit.sparsify_, effvit.convert_, effvit.save_quantized):
        arguments = ("path",) if function is effvit.save_quantized else ()
        with pytest.raises(TypeError, match=rf"effvit\.{function.__name__}: model must be a torch.nn.Module, got int"):
            function(3, *arguments)
        with pytest.raises(ValueError, match=rf"effvit\.{function.__name__}: model must contain the layers"):
            function(nn.Linear(4, 4), *arguments)
    for function in (effvit.unquantize_, effvit.unsparsify_):
        with pytest.raises(TypeError, match=rf"effvit\.{function.__name__}: model must be a torch.nn.Module, got int"):
            function(3)
    with pytest.raises(ValueError, match="quantize_: model must contain a Linear to quantise, got torch.Sequential"):
        effvit.quantize_(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="convert_: model must contain QATLinear layers"):
        effvit.convert_(vit())
    with pytest.raises(ValueError, match="save_quantized: model must have quantised layers"):
        effvit.save_quantized(vit(), "path")
    with pytest.raises(ValueError, match="quantize_: model must have materialised parameters, got meta tensors"):
        effvit.quantize_(vit().to("meta"))
    for options, message in (
        ({"decay": "linear"}, "steps must be positive with a decay, got 0"),
        ({"steps": 3}, "steps must be 0 without a decay, got 3"),
        ({"strength": -1.0}, "strength must be at least 0, got -1.0"),
        ({"algorithm": "random"}, "algorithm must be one of magnitude, transposable"),
    ):
        with pytest.raises(ValueError, match=f"^effvit::sparsify_: {message}"):
            effvit.sparsify_(vit(), **options)


def test_nothing_to_undo(capsys):
    assert effvit.unquantize_(vit()) == effvit.unsparsify_(vit()) == []
    assert capsys.readouterr().out.count("nothing to undo") == 2
    assert str(Report([])) == ""
