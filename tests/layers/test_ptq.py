"""effvit.calibrate_ptq: re-parameterisation, search, mixed bits, files, deployment; accuracy of a ViT trained here."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effvit
from effvit import ptq, quantizers
from effvit.layers.int8 import Int8Linear
from effvit.layers.ptq import FakeQuantizer, PTQLinear
from effvit.recipes import gpusq
from effvit.testing import assert_bitwise_equal

timm = pytest.importorskip("timm")
SCHEMES = ("uniform", "log2", "log_sqrt2", "adalog", "shift_uniform_log2", "tan")


def quiet(model, data, **options):
    return effvit.calibrate_ptq(model, data, verbose=False, progress=False, **options)


def vit(depth=2, **options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    options = {"patch_size": 2, "embed_dim": 32, "num_heads": 2} | options
    return VisionTransformer(img_size=8, in_chans=1, num_classes=10, depth=depth, **options).eval()


def swin():
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    return SwinTransformer(
        img_size=8, in_chans=1, num_classes=10, patch_size=1, embed_dim=16, depths=(2, 2), num_heads=(1, 2),
        window_size=4, drop_path_rate=0.0,
    ).eval()  # fmt: skip


def deit():
    from timm.models.deit import VisionTransformerDistilled

    torch.manual_seed(0)
    return VisionTransformerDistilled(
        img_size=8, in_chans=1, num_classes=10, patch_size=4, embed_dim=32, num_heads=2, depth=1
    ).eval()


MODELS = {"vit": vit, "swin": swin, "deit": deit}


def images(n=6, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def uneven(model):
    """LayerNorms as trained ones are: a few channels much wider than the others, off centre."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.LayerNorm):
                m.weight.copy_(torch.exp(torch.randn(m.weight.shape, generator=generator)))
                m.bias.copy_(torch.randn(m.bias.shape, generator=generator))
                m.weight[:2] *= 8
    return model


def relative(x, truth):
    return float((x.detach() - truth.detach()).norm() / truth.detach().norm())


# ---- re-parameterisation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", ["mean", "median"])
def test_reparameterisation_changes_nothing_but_the_ranges(target, bias):
    torch.manual_seed(0)
    norm, linear = uneven(nn.LayerNorm(24).double()), nn.Linear(24, 40, bias=bias).double()
    x = torch.randn(50, 24, dtype=torch.float64)
    before, between = linear(norm(x)), norm(x).detach()
    ranges = ptq.channel_ranges(between.amin(0), between.amax(0), 4)
    scale, zero_point = ptq.reparameterize(norm, linear, *ranges, target=target)
    after, moved = linear(norm(x)), norm(x).detach()
    assert (
        float((after - before).detach().abs().max())
        < 64 * torch.finfo(torch.float64).eps * float(before.abs().max()) * 24
    )
    assert relative(moved, between) > 0.1
    # Every channel now fills the one range.
    low, high = -scale * zero_point, scale * (15 - zero_point)
    torch.testing.assert_close(moved.amin(0), torch.full((24,), low, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved.amax(0), torch.full((24,), high, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_reparameterisation_is_the_papers_formula():
    """gamma / r, beta / r - b, W diag(r), bias + W diag(r) b with r = s / s~ and b = min / r - min~."""
    torch.manual_seed(0)
    norm, linear = uneven(nn.LayerNorm(8).double()), nn.Linear(8, 5).double()
    s, z = torch.rand(8).double() + 0.1, torch.randint(0, 16, (8,)).double()
    norm0, linear0 = copy.deepcopy(norm), copy.deepcopy(linear)
    s1, z1 = ptq.reparameterize(norm, linear, s, z)
    assert s1 == pytest.approx(float(s.mean())) and z1 == round(float(z.mean()))
    r = s / s1
    b = -z * s / r + z1 * s1
    for found, expected in (
        (norm.weight, norm0.weight / r), (norm.bias, norm0.bias / r - b), (linear.weight, linear0.weight * r),
        (linear.bias, linear0.bias + (linear0.weight * r) @ b),
    ):  # fmt: skip
        torch.testing.assert_close(found.data, expected.data, rtol=1e-12, atol=1e-12)


def test_channels_far_from_zero_are_moved_to_a_code():
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(16).double(), nn.Linear(16, 8).double()
    with torch.no_grad():
        norm.bias.copy_(torch.where(torch.arange(16) < 8, 30.0, -2.0))
    x = torch.randn(40, 16, dtype=torch.float64)
    before, between = linear(norm(x)), norm(x).detach()
    ranges = ptq.channel_ranges(between.amin(0), between.amax(0), 4)
    assert ptq.common_range(*ranges, "mean")[1] < 0
    scale, zero_point = ptq.reparameterize(norm, linear, *ranges, bits=4)
    assert zero_point == 0
    torch.testing.assert_close(linear(norm(x)), before, rtol=1e-10, atol=1e-10)
    quantised = quantizers.uniform(4, scale, zero_point)(norm(x).float())
    assert relative(quantised, norm(x).float()) < 0.1


def test_a_constant_channel_does_no_harm():
    x = torch.randn(30, 6)
    x[:, 2] = 0.5
    scale, zero_point = ptq.channel_ranges(x.amin(0), x.amax(0), 4)
    assert torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(zero_point).all()


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_reparameterisation_helps_where_channels_differ(name):
    model = uneven(MODELS[name]())
    data, x = [images(8, 1)], images(6, 2)
    truth = model(x)
    options = {"weight_bits": 0, "activation_bits": 4, "softmax": "none", "gelu": "none", "input": "none"}
    errors = [relative(quiet(model, data, reparameterize=r, **options)[0](x), truth) for r in (True, False)]
    assert errors[0] < 0.8 * errors[1], errors


# ---- the flow --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models(name):
    model = uneven(MODELS[name]())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x, data = images(5, 2), [images(4, 0), (images(4, 1), torch.zeros(4))]
    errors = []
    for bits in (6, 4):
        quantised, report = quiet(model, data, weight_bits=bits, activation_bits=bits, gelu="adalog")
        errors.append(relative(quantised(x), model(x)))
    assert errors[0] < 0.3 and errors[0] < errors[1] < 0.9, errors
    for k, v in model.state_dict().items():
        assert_bitwise_equal(v, state[k], name=k)
    assert not any(isinstance(m, (PTQLinear, FakeQuantizer)) for m in model.modules())
    linears = {n for n, m in quantised.named_modules() if isinstance(m, PTQLinear)}
    assert {r.name for r in report.changed if r.module == "Linear"} == linears
    assert {r.name for r in report.unchanged} == {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in linears
    }
    operands = [r.name for r in report.changed if r.module == "operand"]
    assert len(operands) == 4 * sum(type(m).__name__.endswith("Attention") for m in model.modules())
    assert not [r for r in report.changed if r.output_error is None or not 0 <= r.output_error < 1]
    assert "re-parameterised" in str(report) and "adalog" in str(report)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_without_quantisers_the_copy_is_the_model(name):
    """Attention with its products written out, and re-parameterised norms, compute what the model did."""
    model, x = uneven(MODELS[name]()), images(5, 2)
    copied = ptq.prepare_ptq(model)[0]
    assert relative(copied(x), model(x)) < 1e-5
    quantised, _ = quiet(model, [images()])
    for m in quantised.modules():
        if isinstance(m, FakeQuantizer):
            m.enabled = False
        elif isinstance(m, PTQLinear):
            m.use_weight(0)
    assert relative(quantised(x), model(x)) < 1e-4


def test_attention_that_is_left_alone_is_in_the_report():
    from timm.models.vision_transformer import Attention

    model = vit(2)
    model.blocks[0].attn.__class__ = Mine = type("Mine", (Attention,), {})
    model.blocks[1].attn.forward = model.blocks[1].attn.forward
    copied, report = quiet(model, [images()])
    rows = {r.name: r.detail for r in report.unchanged}
    last = ": its products stay in floating point"
    assert rows["blocks.0.attn"] == f"a subclass of timm's Attention{last}"
    assert rows["blocks.1.attn"] == f"its forward is replaced on the instance{last}"
    assert not [r for r in report if r.module == "operand"] and type(copied.blocks[0].attn) is Mine


def test_sparsified_models():
    """What is quantised are the weights that the masks leave."""
    model, x = vit(1), images(5, 2)
    effvit.sparsify_(model, verbose=False)
    masked, _ = quiet(model, [images()])
    effvit.unsparsify_(model, keep_zeros=True, verbose=False)
    assert_bitwise_equal(masked(x), quiet(model, [images()])[0](x))


def test_bytes_are_those_of_the_dtype():
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = vit(1).to(dtype)
        _, report = quiet(model, [images().to(dtype)], weight_bits=4, activation_bits=4, gelu="uniform")
        row = next(r for r in report if r.name == "blocks.0.mlp.fc1")
        assert (row.bytes_before, row.bytes_after) == (128 * 32 * size, 128 * 32 // 2 + 128 * 4)


def test_masks_of_attention():
    attention = vit().blocks[0].attn
    copied = ptq.prepare_ptq(nn.Sequential(attention))[0][0]
    attention.fused_attn = False
    x, mask = torch.randn(2, 5, 32), torch.rand(5, 5) > 0.4
    mask.fill_diagonal_(True)
    torch.testing.assert_close(copied(x, attn_mask=mask), attention(x, attn_mask=mask))
    bias = torch.randn(5, 5)
    torch.testing.assert_close(copied(x, attn_mask=bias), attention(x, attn_mask=bias))
    torch.testing.assert_close(copied(x, is_causal=True), attention(x, is_causal=True))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_state_dict(name, tmp_path):
    model, x = uneven(MODELS[name]()), images(5, 2)
    quantised, _ = quiet(model, [images()], weight_bits=4, activation_bits=4)
    torch.save(quantised.state_dict(), tmp_path / "ptq.pt")
    fresh = ptq.prepare_ptq(MODELS[name]())[0]
    fresh.load_state_dict(torch.load(tmp_path / "ptq.pt", weights_only=True))
    assert_bitwise_equal(fresh(x), quantised(x))
    assert_bitwise_equal(copy.deepcopy(quantised)(x), quantised(x))


def test_half_precision():
    model = vit().bfloat16()
    quantised, _ = quiet(model, [images().bfloat16()], weight_bits=6, activation_bits=6)
    y = quantised(images(3, 1).bfloat16())
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()
    tables = [t for m in quantised.modules() if isinstance(m, FakeQuantizer) for t in (m.thresholds, m.values)]
    assert all(t.dtype == torch.float32 for t in tables)
    layers = [m for m in quantised.modules() if isinstance(m, PTQLinear)]
    for layer in layers:  # the weight is what its codes stand for
        exact = layer.weight_codes().float() * layer.weight_scale[:, None]
        assert_bitwise_equal(layer.effective_weight(), exact.bfloat16())
    half = copy.deepcopy(quiet(vit(), [images()])[0]).half()
    assert all(m.values.dtype == torch.float32 for m in half.modules() if isinstance(m, FakeQuantizer))


def test_gradients_reach_every_parameter_and_training_reduces_the_error():
    """Reconstruction: the quantised copy is trained to give what the model gives."""
    model, x = uneven(vit()), images(16, 5)
    quantised, _ = quiet(model, [x], weight_bits=3, activation_bits=4)
    truth = model(x).detach()
    parameters = [p for n, p in quantised.named_parameters() if "norm.weight" not in n]
    optimizer, losses = torch.optim.Adam(parameters, 1e-4), []
    for _ in range(20):
        loss = F.mse_loss(quantised(x), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)
    assert min(losses[5:]) < 0.8 * losses[0], losses


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_reconstruction(name):
    """Every block comes closer to the float one on its data; the model does, on other data."""
    model, data, x = uneven(MODELS[name]()), [images(12, 5), images(12, 6)], images(8, 7)
    quantised, _ = quiet(model, data, weight_bits=3, activation_bits=4, softmax="log_sqrt2", gelu="uniform")
    before = relative(quantised(x), model(x))
    errors = ptq.reconstruct_(quantised, model, data, steps=30, rate=5e-4, bar=False)
    assert len(errors) == sum(hasattr(m, "attn") for m in model.modules())
    assert all(after <= first for first, after in errors.values())
    assert sum(after < 0.98 * first for first, after in errors.values()) >= len(errors) - 1, errors
    assert relative(quantised(x), model(x)) < before
    assert all(p.grad is None and p.requires_grad for p in quantised.parameters())
    with pytest.raises(ValueError, match="effvit::reconstruct_: model must be the one that quantised was made from"):
        ptq.reconstruct_(quantised, nn.Sequential(nn.Linear(3, 3)), data)
    with pytest.raises(ValueError, match="effvit::reconstruct_: steps must be between 1 and"):
        ptq.reconstruct_(quantised, model, data, steps=0)


def test_weights_have_few_values_and_the_searched_scale_is_better():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    with torch.no_grad():
        model[0].weight[:, 3] *= 4
    errors = {}
    for how in ("mse", "percentile", "max"):
        quantised, report = quiet(model, [torch.randn(40, 64)], weight_bits=4, weights=how, input="none")
        layer = quantised[0]
        assert all(len(row.unique()) <= 15 for row in layer.effective_weight())
        assert_bitwise_equal(layer.weight_codes().float() * layer.weight_scale[:, None], layer.effective_weight())
        errors[how] = report.rows[0].weight_error
    assert errors["mse"] < errors["percentile"] and errors["mse"] < errors["max"]


def test_auto_takes_the_best_scheme():
    model, data = uneven(vit()), [images(8)]
    options = {"weight_bits": 0, "activation_bits": 4, "gelu": "none", "norm": "none", "input": "none"}
    found = {}
    for scheme in ("auto", *SCHEMES):
        report = quiet(model, data, softmax=scheme, **options)[1]
        found[scheme] = {r.name: r.output_error for r in report.changed if r.name.endswith("softmax_act")}
    for name, e in found["auto"].items():
        assert e == pytest.approx(min(found[s][name] for s in SCHEMES), rel=1e-3)


# ---- relevance and mixed bits --------------------------------------------------------------------------------------


def test_relevance_is_gradient_times_input():
    """Of layers without bias and ReLU it is what the epsilon rule gives: relevances of a layer sum to the output."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False)
    )
    x = torch.rand(4, 6)
    scores = ptq.relevance(model, {n: model[int(n)] for n in ("0", "2", "4")}, [x])
    # Epsilon-LRP with epsilon towards 0: R_j = sum_k x_j w_kj / z_k R_k.
    activations, layers = [x], [model[0], model[2], model[4]]
    for layer in layers:
        activations.append(F.relu(layer(activations[-1])) if layer is not model[4] else layer(activations[-1]))
    top = activations[-1].argmax(1)
    r = F.one_hot(top, 3) * activations[-1]
    expected = []
    for layer, a in zip(layers[::-1], activations[-2::-1], strict=True):
        z = a @ layer.weight.T
        s = torch.where(r == 0, 0.0, r / z)
        r = a * (s @ layer.weight)
        torch.testing.assert_close(r.sum(1), activations[-1].amax(1), rtol=1e-4, atol=1e-5)
        expected.insert(0, float(r.detach().abs().sum()))
    total = sum(expected)
    assert sum(scores.values()) == pytest.approx(1)
    assert [scores[n] for n in ("0", "2", "4")] == pytest.approx([e / total for e in expected], rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_bits_follow_relevance_within_the_budget():
    model, data, x = uneven(vit(depth=3)), [images(8)], images(6, 2)
    errors = []
    for budget in (3.0, 4.2, 6.0, 8.0):
        quantised, report = quiet(model, data, average_bits=budget, bit_choices=(3, 4, 6, 8), softmax="adalog",
                                  gelu="uniform")  # fmt: skip
        layers = [m for m in quantised.modules() if isinstance(m, PTQLinear)]
        sizes = [m.weight.numel() for m in layers]
        used = sum(m.weight_bits * n for m, n in zip(layers, sizes, strict=True)) / sum(sizes)
        assert used <= budget + 1e-9 and all(m.act.bits == m.weight_bits for m in layers)
        assert budget in (3.0, 8.0) or len({m.weight_bits for m in layers}) > 1
        assert "relevance" in report.changed[0].detail
        errors.append(relative(quantised(x), model(x)))
    assert errors[3] < errors[1] < errors[0], errors


# ---- deployment ------------------------------------------------------------------------------------------------------


def test_deployed_layers_compute_the_same():
    model, x = uneven(vit()), images(5, 2)
    options = {"norm": "int8", "gelu": "int8", "input": "int8", "softmax": "log2"}
    quantised, _ = quiet(model, [images(8)], **options)
    expected = quantised(x).detach()
    layer, tokens = quantised.blocks[0].mlp.fc1, torch.randn(7, 32)
    outputs = layer(tokens), layer.deployed()(tokens)
    assert relative(outputs[1], outputs[0]) < 1e-6
    names = effvit.deploy_ptq_(quantised, verbose=False)
    assert len(names) == 8 and isinstance(quantised.blocks[1].attn.qkv, Int8Linear)
    assert relative(quantised(x), expected) < 0.02  # a sum in another order may move a tie of a later quantiser
    with pytest.raises(ValueError, match="effvit::deploy_ptq_: model must be one with int8 inputs"):
        effvit.deploy_ptq_(quiet(model, [images()])[0])


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, match",
    [
        ({"weight_bits": 9}, "weight_bits must be between 0 and 8, got 9"),
        ({"weight_bits": 1}, "weight_bits must be 0 or 2 to 8, got 1"),
        ({"activation_bits": 1}, "activation_bits must be between 2 and 8, got 1"),
        ({"softmax": "log3"}, "softmax must be one of uniform, log2, .*, got 'log3'"),
        ({"norm": "int8", "activation_bits": 4}, "norm must be another than int8 where activations have other bits"),
        ({"target": "max"}, "target must be one of mean, median, got 'max'"),
        ({"weights": "best"}, "weights must be one of mse, percentile, max"),
        ({"average_bits": 3.0}, "average_bits must be at least the least of bit_choices, 4, got 3.0"),
        ({"bit_choices": (4, 9)}, r"bit_choices\[1\] must be between 2 and 8, got 9"),
        ({"candidates": ("log2", "log")}, r"candidates\[1\] must be one of"),
        ({"batches": 0}, "batches must be positive or None, got 0"),
        ({"skip": "*"}, "model must be one with a Linear to quantise"),
    ],
)
def test_errors_of_the_configuration(options, match):
    with pytest.raises(ValueError, match=f"effvit::calibrate_ptq: {match}"):
        quiet(vit(1), [images()], **options)


@pytest.mark.parametrize(
    "model, data, error, match",
    [
        (lambda: nn.Linear(3, 3), [torch.zeros(1, 3)], ValueError, "model must be a module that contains"),
        (lambda: "model", [], TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: vit(1).double(), [images().double()], TypeError, "model must be in float32, bfloat16 or float16"),
        (lambda: vit(1), [], ValueError, "calibration must be at least one batch, got none"),
        (lambda: vit(1), images(), TypeError, "calibration must be an iterable of batches, got Tensor"),
        (lambda: effvit_patched(), [images()], ValueError, "model must be unpatched"),
        (lambda: int8_attention(), [images()], ValueError, r"model must be in .*unquantize_ first\), got int8 att"),
    ],
)
def test_errors_of_model_and_data(model, data, error, match):
    with pytest.raises(error, match=f"effvit::calibrate_ptq: {match}"):
        quiet(model(), data)


def effvit_patched():
    model = vit(1)
    effvit.patch(model, verbose=False)
    return model


def int8_attention():
    model = vit(1)
    effvit.quantize_(model, attention="int8", kind="float", verbose=False)
    return model


def test_tan_takes_numbers_from_0():
    with pytest.raises(ValueError, match="must have numbers from 0 on, which tan takes, got values from -0"):
        quiet(vit(1), [images()], gelu="tan")


def test_data_that_is_not_finite():
    with pytest.raises(
        ValueError, match="calibration must be such that activations are finite, got NaN or infinity in"
    ):
        quiet(vit(1), [torch.full((2, 1, 8, 8), torch.nan)])


def test_progress_and_report_are_shown(capsys):
    effvit.calibrate_ptq(vit(1), [images()])
    shown = capsys.readouterr()
    assert "calibrating" in shown.err and "blocks.0.attn.softmax_act" in shown.out and "KiB before" in shown.out


def test_codes_of_a_module():
    act = FakeQuantizer()
    x = torch.rand(3, 7)
    with pytest.raises(ValueError, match="effvit::FakeQuantizer: the quantiser must be calibrated, got none"):
        act.codes(x)
    quantizer = quantizers.log2(4)
    assert_bitwise_equal(act.use(quantizer).codes(x), quantizer.quantize(x))
    assert act.use_int8(0.01).codes(x).dtype == torch.int8


# ---- a ViT that knows something ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """(a small ViT trained on scikit-learn's digits, its data)"""
    pytest.importorskip("sklearn")
    data = gpusq.load_digits()
    torch.manual_seed(0)
    model = vit(2, class_token=False, global_pool="avg")
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
    epochs, rate, batch = 7, 4e-3, 32
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.02)
    steps = epochs * -(-len(data.train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for i in torch.randperm(len(data.train), generator=generator).split(batch):
            loss = F.cross_entropy(model(data.train[i]), data.train_labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval(), data


@torch.no_grad()
def accuracy(model, data):
    return 100 * float((model(data.test).argmax(1) == data.test_labels).float().mean())


@pytest.mark.xdist_group("ptq-trained")  # one worker trains it
@pytest.mark.parametrize("softmax", [*SCHEMES, "auto"])
def test_accuracy(trained, softmax):
    """W8A8 loses at most 2 points of 450 images, W4A4 at most 8, with every quantiser of the softmax."""
    model, data = trained
    before = accuracy(model, data)
    assert before > 80
    calibration = [data.train[i : i + 64] for i in (0, 64)]
    for bits, lost in ((8, 2.0), (4, 8.0)):
        options = {"weight_bits": bits, "activation_bits": bits, "softmax": softmax, "gelu": "uniform"}
        quantised, _ = quiet(model, calibration, **options)
        assert accuracy(quantised, data) >= before - lost, (bits, before)


@pytest.mark.xdist_group("ptq-trained")
def test_repq_is_closer_to_the_trained_model_than_plain_at_few_bits(trained):
    model, data = trained
    calibration = [data.train[i : i + 64] for i in (0, 64)]
    truth = model(data.test)
    for bits in (3, 4):
        options = {"weight_bits": 0, "activation_bits": bits, "softmax": "log_sqrt2"}
        errors = [
            relative(quiet(model, calibration, reparameterize=r, **options)[0](data.test), truth) for r in (True, False)
        ]
        assert errors[0] < errors[1], (bits, errors)
