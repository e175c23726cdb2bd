"""effvit.patch on whole timm models: agreement, exact reversal, and everything else a user does to a model."""

import contextlib
import copy
import io
import pickle
import subprocess
import sys
import textwrap

import pytest
import timm
import timm.models.swin_transformer as timm_swin
import torch
from layer_suite import Record

import effvit
import effvit.ops
from effvit._accuracy import assert_bitwise_equal, assert_close_to_truth
from effvit.patch import Report, VerificationError

DTYPES = [torch.float32, torch.bfloat16]


def tiny(seed=0, **kwargs):
    """A Swin small enough to do everything to: 16x16 map, padded 8x8 map with window 7, qkv biases that matter."""
    torch.manual_seed(seed)
    kwargs = {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6), "num_classes": 10, **kwargs}
    return excite(timm_swin.SwinTransformer(**{"drop_path_rate": 0.0, **kwargs})).eval()


def excite(model, seed=0):
    """Fresh biases, tables and logits are near zero; a checkpoint's are not, and hide neither padding nor scale."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("qkv.bias") or "bias_table" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.5)
            elif name.endswith("qkv.weight"):
                p.copy_(torch.randn(p.shape, generator=g) * p.shape[1] ** -0.5)
    return model


def images(n, *size, seed=0):
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def run(model, x, gradients):
    """Output of the model and, with a fixed cotangent, every parameter gradient."""
    if not gradients:
        with torch.no_grad():
            return {"output": model(x)}
    model.zero_grad()
    y = model(x)
    w = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * w.to(y.dtype)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return {"output": y.detach(), **found}


@contextlib.contextmanager
def linear_tokens(model, found):
    """While it lasts, found[name] = (tokens, their gradients), both [tokens, channels], of every linear layer."""
    inputs, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def forward(module, args, out, name=name):
                inputs[name] = args[0].detach().flatten(0, -2)

            def backward(module, grad_input, grad_output, name=name):
                found[name] = (inputs[name], grad_output[0].detach().flatten(0, -2))

            handles += [module.register_forward_hook(forward), module.register_full_backward_hook(backward)]
    yield
    for handle in handles:
        handle.remove()


def magnitudes(model, x, exact):
    """What parameter gradients are measured against: their largest entry, or the sum of their absolute terms.

    The gradient of a linear layer's weight is a sum over tokens, often of terms much larger than itself. The terms are
    products of activations that carry errors of their own, relative to the largest: hence never less than that.
    """
    found = {name: truth.abs().max().expand_as(truth) for name, truth in exact.items() if name != "output"}
    tokens = {}
    with linear_tokens(model, tokens):
        run(model, x, True)
    for layer, (x, g) in tokens.items():
        for name, m in ((f"{layer}.weight", g.abs().T @ x.abs()), (f"{layer}.bias", g.abs().sum(0))):
            if name in found:
                found[name] = torch.maximum(found[name], m)
    return {"output": None, **found}


def in_other_orders(model, x, before):
    """The weight gradients of linear layers, summed over the tokens in two other orders, as PyTorch is free to do.

    Padding changes the number of tokens and with it the order in which the unpatched model sums them.
    """
    tokens = {}
    with linear_tokens(model, tokens):
        run(model, x, True)
    orders = (lambda t: t.flip(0), lambda t: torch.cat([t[0::2], t[1::2]]))
    return [before | {f"{name}.weight": order(g).T @ order(x) for name, (x, g) in tokens.items()} for order in orders]


def on_sdpa(model):
    """The same model with timm's other implementation of the same formula: a second yardstick."""
    for module in model.modules():
        if isinstance(module, timm_swin.WindowAttention):
            module.fused_attn = True
    return model


def check_patched(model, x, gradients=True, exact=None):
    """Runs model before and after effvit.patch; both against the model in float64. Leaves it patched."""
    before = [run(model, x, gradients), run(on_sdpa(copy.deepcopy(model)), x, gradients)]
    exact = run(copy.deepcopy(model).double(), x.double(), gradients) if exact is None else exact
    magnitude = {"output": None}
    if gradients:
        magnitude = magnitudes(copy.deepcopy(model).double(), x.double(), exact)
        before += in_other_orders(copy.deepcopy(model), x, before[0])
    report = effvit.patch(model, verify=False, verbose=False)
    with Record() as calls:
        after = run(model, x, gradients)
    assert calls.names.count("window_attention") == len(report.replaced) > 0
    assert calls.names.count("window_attention_backward") == gradients * len(report.replaced)
    assert not {"roll", "_softmax", "index"} & set(calls.names)
    assert after.keys() == exact.keys()
    for name, truth in exact.items():
        eps = torch.finfo(x.dtype).eps
        assert_close_to_truth(
            after[name], truth, [b[name] for b in before], magnitude=magnitude[name], eps=eps, name=name
        )


# ---- whole models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swin_tiny_224(dtype):
    torch.manual_seed(0)
    model = excite(timm.create_model("swin_tiny_patch4_window7_224", num_classes=20)).eval().to(dtype)
    check_patched(model, images(1, 224, 224).to(dtype))


def test_swin_small_384_forward():
    """The true Swin-S at 384: windows grow with the image, to 12."""
    torch.manual_seed(0)
    model = timm.create_model("swin_small_patch4_window7_224", num_classes=20)
    model.set_input_size(img_size=384)
    excite(model.eval())
    assert model.layers[0].blocks[1].window_size == (12, 12)
    check_patched(model, images(1, 384, 384), gradients=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swin_small_stages_384_gradients(dtype):
    """Swin-S's first stages at 384, window 12: two of them, and only the first where bfloat16 GEMMs may be emulated."""
    torch.manual_seed(0)
    stages = 2 if dtype == torch.float32 else 1
    model = timm_swin.SwinTransformer(
        img_size=384, embed_dim=96, depths=(2,) * stages, num_heads=(3, 6)[:stages], window_size=12, num_classes=10
    )
    check_patched(excite(model).eval().to(dtype), images(1, 384, 384).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(232, 232), (252, 180)], ids=str)
def test_maps_that_need_padding(size, dtype):
    """58x58 and 63x45 maps with window 7: timm rolls, then pads, and the padding is the qkv bias."""
    torch.manual_seed(0)
    model = timm_swin.SwinTransformer(
        img_size=224, embed_dim=48, depths=(2, 2, 2), num_heads=(3, 6, 12), num_classes=10, strict_img_size=False
    )
    model = excite(model).eval().to(dtype)
    assert model.layers[0].blocks[1].dynamic_mask
    x = images(1, *size).to(dtype)
    check_patched(model, x)
    # The same model takes another size at once.
    other = images(1, 200, 136).to(dtype)
    after = run(model, other, False)["output"]
    effvit.unpatch(model)
    exact = run(copy.deepcopy(model).double(), other.double(), False)["output"]
    assert_close_to_truth(after, exact, run(model, other, False)["output"])


@pytest.mark.parametrize(
    "change", [{"img_size": (96, 96)}, {"img_size": (80, 112), "window_size": (5, 6)}, {"window_size": 4}], ids=str
)
def test_after_set_input_size(change):
    """Resized before patching and resized while patched: the same model."""
    x = images(2, *change.get("img_size", (64, 64)))
    model = tiny()
    model.set_input_size(**change)
    other = tiny()
    effvit.patch(other, verify=False, verbose=False)
    other.set_input_size(**change)
    check_patched(model, x)
    assert_bitwise_equal(other(x), model(x))
    effvit.unpatch(other)
    effvit.unpatch(model)
    assert_bitwise_equal(other(x), model(x))


@pytest.mark.parametrize(
    "kwargs",
    [{"qkv_bias": False}, {"head_dim": 4}, {"window_size": 5}, {"window_size": (4, 7)}, {"always_partition": True}],
    ids=str,
)
def test_variants(kwargs):
    check_patched(tiny(**kwargs), images(2, 64, 64))


# ---- reversal and identity --------------------------------------------------------------------------------------


def test_unpatch_is_exact():
    model, x = tiny(), images(2, 64, 64)
    classes = [type(m) for m in model.modules()]
    attributes = [{k: id(v) for k, v in vars(m).items()} for m in model.modules()]
    tensors = {n: (id(t), t._version) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    keys, before = list(model.state_dict()), model(x)
    effvit.patch(model, verbose=False)
    assert {n: (id(t), t._version) for n, t in [*model.named_parameters(), *model.named_buffers()]} == tensors
    assert list(model.state_dict()) == keys
    assert classes != [type(m) for m in model.modules()]
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    model(x)
    names = effvit.unpatch(model)
    assert len(names) == 8 and "layers.1.blocks.1" in names
    assert [type(m) for m in model.modules()] == classes
    assert [{k: id(v) for k, v in vars(m).items()} for m in model.modules()] == attributes
    assert_bitwise_equal(model(x), before)


def test_training_flags_and_random_state_are_left_alone():
    model = tiny().train()
    model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    effvit.patch(model, example=images(1, 64, 64), verbose=False)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_state_dict_round_trip():
    x = images(2, 64, 64)
    a, b, c = tiny(0), tiny(1), tiny(2)
    effvit.patch(b, verify=False, verbose=False)
    b.load_state_dict(a.state_dict(), strict=True)  # timm's checkpoint into a patched model
    c.load_state_dict(b.state_dict(), strict=True)  # and back
    assert_bitwise_equal(c(x), a(x))
    assert_close_to_truth(b(x), copy.deepcopy(a).double()(x.double()), a(x))


def test_deepcopy_pickle_and_torch_save():
    model, x = tiny(), images(2, 64, 64)
    before = model(x)
    effvit.patch(model, verbose=False, verify=False)
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert_bitwise_equal(other(x), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        assert len(effvit.unpatch(other)) == 8
        assert_bitwise_equal(other(x), before)
    assert_bitwise_equal(model(x), expected)  # unpatching a copy did not reach the original


def test_a_pickle_loads_in_a_process_that_has_not_imported_effvit(tmp_path):
    model, x = tiny(), images(1, 64, 64)
    effvit.patch(model, verbose=False, verify=False)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    code = """
        import sys, torch
        from effvit.testing import torchvision_schemas
        torchvision_schemas()
        model, x, y = torch.load(sys.argv[1], weights_only=False)
        assert torch.equal(model(x), y)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "model.pt")], check=True)


def test_hooks_fire_on_every_module_of_a_block():
    model, x = tiny(), images(1, 64, 64)
    seen = []
    for name, m in model.layers[0].blocks[1].named_modules():
        m.register_forward_hook(lambda *a, name=name: seen.append(name))
    model(x)
    expected, seen[:] = list(seen), []
    effvit.patch(model, verbose=False)
    assert seen == []  # verification ran on copies without hooks
    model(x)
    assert seen == expected


def test_two_patches_are_one(capsys):
    model, x = tiny(), images(1, 64, 64)
    first = effvit.patch(model, verbose=False)
    y, classes = model(x), [type(m) for m in model.modules()]
    again = effvit.patch(model)
    assert "4 x effvit.FusedSwinTransformerBlock" in capsys.readouterr().out
    assert len(first.replaced) == 4 and not again.replaced
    assert {r.detail for r in again.not_replaced} == {"already patched"}
    assert [type(m) for m in model.modules()] == classes
    assert_bitwise_equal(model(x), y)
    assert len(effvit.unpatch(model)) == 8
    assert effvit.unpatch(model) == []
    assert "nothing to undo" in capsys.readouterr().out


# ---- report, refusal, verification -------------------------------------------------------------------------------


def test_report(capsys):
    model = tiny().bfloat16()
    report = effvit.patch(model, example=images(1, 64, 64).bfloat16())
    assert isinstance(report, Report) and str(report) in capsys.readouterr().out
    assert [r.name for r in report.replaced][:2] == ["layers.0.blocks.0", "layers.0.blocks.1"]
    assert report.replaced[-1].name == "(whole model)" and len(report) == 5
    assert "map 16x16 window 7x7 shift 3,3 heads 3x8" in str(report)
    for row in report:
        assert row.ok and row.dtype == "bfloat16" and 0 < row.error_effvit <= row.bound and row.error_original > 0
    effvit.unpatch(model)
    quiet = effvit.patch(model, verify=False, verbose=False)
    assert capsys.readouterr().out == "" and all(r.error_effvit is None for r in quiet)


class OtherAttention(torch.nn.Module):
    pass


class Subclassed(timm_swin.SwinTransformerBlock):
    pass


def test_what_is_not_replaced_has_a_reason():
    model = tiny()
    blocks = [b for stage in model.layers for b in stage.blocks]
    blocks[0].attn.__class__ = type("Mine", (timm_swin.WindowAttention,), {})
    blocks[1].__class__ = Subclassed
    blocks[2].attn.forward = blocks[2].attn.forward
    model.extra = torch.nn.ModuleList([OtherAttention(), timm_swin.WindowAttention(8, 2)])
    report = effvit.patch(model, verbose=False)
    reasons = {r.name: r.detail for r in report.not_replaced}
    assert "not timm's WindowAttention" in reasons["layers.0.blocks.0"]
    assert "a subclass of SwinTransformerBlock" in reasons["layers.0.blocks.1"]
    assert "replaced on the instance" in reasons["layers.1.blocks.0"]
    assert reasons["extra.0"] == reasons["extra.1"] == "no effvit adapter for this class"
    assert len(reasons) == 5 and [r.name for r in report.replaced] == ["layers.1.blocks.1"]
    model(images(1, 64, 64))


def test_models_without_swin_blocks():
    with pytest.raises(ValueError, match=r"got torch.Linear with no attention module"):
        effvit.patch(torch.nn.Linear(2, 2))
    xcit = timm.create_model("xcit_nano_12_p16_224")
    with pytest.raises(ValueError, match=r"got timm.Xcit with .*2 x timm.ClassAttentionBlock: no effvit adapter"):
        effvit.patch(xcit)
    for f in (effvit.patch, effvit.unpatch):
        with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got dict"):
            f({})
    with pytest.raises(ValueError, match="got meta tensors"):
        effvit.patch(timm_swin.SwinTransformer(img_size=64, depths=(1,), num_heads=(3,), device="meta"))


WRONG = {
    "no shift": lambda op, q, k, v, *a, **kw: op(q, k, v, *a, **{**kw, "shift": 0}),
    "no padding": lambda op, q, k, v, t, s, pk, pv, **kw: op(q, k, v, t, s, None, None, **kw),
    "pad, then roll": lambda op, q, k, v, *a, **kw: op(q, k, v, *a, **{**kw, "roll_before_pad": False}),
    "flipped table": lambda op, q, k, v, t, *a, **kw: op(q, k, v, t.flip(1, 2), *a, **kw),
    "scale off by 1e-4": lambda op, *a, **kw: op(*a, **{**kw, "scale": kw["scale"] * 1.0001}),
    "output off by 1e-5": lambda op, *a, **kw: (op(*a, **kw)[0] * (1 + 1e-5), None),
    "one value": lambda op, *a, **kw: (op(*a, **kw)[0].index_fill(2, torch.tensor(0), 0.0), None),
    "not a number": lambda op, *a, **kw: (op(*a, **kw)[0] * float("nan"), None),
    "swapped k, v": lambda op, q, k, v, *a, **kw: op(q, v, k, *a, **kw),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_verification_catches_a_wrong_kernel(wrong, monkeypatch):
    model, x = tiny(), images(1, 64, 64)
    before = model(x)
    right = effvit.ops.window_attention
    monkeypatch.setattr(effvit.ops, "window_attention", lambda *a, **kw: wrong(right, *a, **kw))
    with pytest.raises(VerificationError, match="disagree with the original, the model is unchanged") as info:
        effvit.patch(model, verbose=False)
    assert any(not r.ok for r in info.value.report)
    assert effvit.unpatch(model, verbose=False) == []
    assert_bitwise_equal(model(x), before)


# ---- compilers, checkpointing, training --------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False], ids=["fixed size", "padded map"])
def test_compile_fullgraph(strict):
    model = tiny(strict_img_size=strict)
    effvit.patch(model, verify=False, verbose=False)
    x = images(2, 64, 64) if strict else images(2, 72, 60)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, got = run(model, x, True), run(compiled, x, True)
    for name, value in expected.items():
        torch.testing.assert_close(got[("_orig_mod." + name) if name != "output" else name], value)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(use_reentrant)
    try:
        model, x = tiny().train(), images(2, 64, 64)
        effvit.patch(model, verify=False, verbose=False)
        expected = run(model, x, True)
        model.set_grad_checkpointing(True)
        with Record() as calls:
            model(x.clone().requires_grad_()).sum().backward()
        assert calls.names.count("window_attention") == 8  # four blocks, and again in backward
        assert calls.names.count("window_attention_backward") == 4
        for name, value in run(model, x, True).items():
            assert_bitwise_equal(value, expected[name], name=name)
    finally:
        timm.layers.set_reentrant_ckpt(before)


def test_optimizer_made_before_patching_trains_the_patched_model():
    """scikit-learn's digits: the loss falls, and along the same curve as without effvit."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images[:128], dtype=torch.float32)[:, None]
    x, y = (x - x.mean()) / x.std(), torch.tensor(digits.target[:128])

    def losses(patched, dtype=torch.float32):
        torch.manual_seed(0)
        # A 4x4 map in windows of 3: shifted and padded, then a 2x2 map.
        model = timm_swin.SwinTransformer(
            img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depths=(2, 2), num_heads=(2, 4),
            window_size=3, strict_img_size=False, drop_path_rate=0.0,
        ).to(dtype)  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        if patched:
            effvit.patch(model, verify=False, verbose=False)
        curve = []
        for step in range(24):
            batch = slice(64 * (step % 2), 64 * (step % 2) + 64)
            loss = torch.nn.functional.cross_entropy(model(x[batch].to(dtype)), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        return torch.stack(curve)

    patched, plain = losses(True), losses(False)
    assert patched[-1] < 0.25 * patched[0]
    # Rounding differences grow along training, so the yardstick is timm against itself in float64.
    exact = losses(False, torch.float64)
    assert_close_to_truth(patched, exact, plain)


def test_hooks_inside_attention_fire_as_in_timm():
    """On the same shapes, as often: also those of softmax and dropout, also on padded maps."""
    x = images(2, 64, 64)
    seen = {}
    for patched in (False, True):
        model, calls = tiny(), seen.setdefault(patched, [])
        if patched:
            effvit.patch(model, verbose=False)
        for name, module in model.named_modules():
            if ".attn." in name:
                module.register_forward_hook(
                    lambda m, args, out, name=name, calls=calls: calls.append((name, tuple(out.shape)))
                )
        with torch.no_grad():
            model(x)
    assert seen[True] == seen[False] and any("softmax" in name for name, _ in seen[True])


def test_hook_of_the_projection_alone_fires_once():
    """The operator still runs; the hook sees a padded map, once."""
    model, calls = tiny(), []
    effvit.patch(model, verbose=False)
    attn = model.layers[0].blocks[1].attn
    handle = attn.qkv.register_forward_hook(lambda m, args, out: calls.append(tuple(out.shape)))
    x = images(2, 64, 64)
    with torch.no_grad(), Record() as record:
        hooked = model(x)
    assert calls == [(2, 21, 21, 72)] and record.names.count("window_attention") == 4
    handle.remove()
    with torch.no_grad():
        assert_close_to_truth(hooked, copy.deepcopy(model).double()(x.double()), model(x))


def test_dynamically_quantised_models():
    """Their projections hold integers: verified with the weights that these stand for."""
    model = torch.ao.quantization.quantize_dynamic(tiny(), {torch.nn.Linear}, torch.qint8)
    x = images(2, 64, 64)
    with torch.no_grad():
        before = model(x)
        report = effvit.patch(model, verbose=False)
        after = model(x)
    assert len(report.replaced) == 4 and all(r.error_effvit is not None for r in report.replaced)
    step = 2 / 127 * float(before.abs().max())  # a rounding may turn into a step of what is quantised
    assert float((after - before).abs().max()) <= step


@pytest.mark.parametrize("unpatched_first", [True, False])
def test_unpatch_keeps_parametrisations(unpatched_first):
    class Scale(torch.nn.Module):
        def forward(self, w):
            return w * 1.5

    model, x, name = tiny(), images(2, 64, 64), "relative_position_bias_table"
    expected = copy.deepcopy(model)
    for m in (model, expected):
        if m is model:
            effvit.patch(m, verbose=False)
        torch.nn.utils.parametrize.register_parametrization(m.layers[0].blocks[1].attn, name, Scale())
    attn = model.layers[0].blocks[1].attn
    steps = [
        lambda: effvit.unpatch(model, verbose=False),
        lambda: torch.nn.utils.parametrize.remove_parametrizations(attn, name),
    ]
    for step in steps if unpatched_first else steps[::-1]:
        step()
        with torch.no_grad():
            assert_close_to_truth(model(x), copy.deepcopy(expected).double()(x.double()), expected(x))
    assert type(attn) is timm_swin.WindowAttention


def test_unpatch_keeps_fully_shard(tmp_path):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model, x = tiny(), images(2, 64, 64)
        with torch.no_grad():
            expected = model(x)
        effvit.patch(model, verbose=False)
        block = model.layers[0].blocks[0]
        fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert effvit.unpatch(model, verbose=False)
        assert isinstance(block, FSDPModule) and isinstance(block, timm_swin.SwinTransformerBlock)
        assert not isinstance(block, effvit.adapters.Fused)
        block.unshard()
        block.reshard()
        with torch.no_grad():
            assert_bitwise_equal(model(x), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_patch_under_the_meta_device():
    model = tiny()
    with torch.device("meta"):
        report = effvit.patch(model, verbose=False)
    assert len(report.replaced) == 4 and all(r.ok for r in report.replaced)


def tiny_vit():
    torch.manual_seed(0)
    return excite(
        timm.models.vision_transformer.VisionTransformer(
            img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5
        )
    ).eval()  # fmt: skip


BEFORE = {
    "dynamic": lambda m, x: quantize(m),
    "static_smooth": lambda m, x: quantize(m, mode="static", smooth=0.5, calibration=[x]),
    "outlier": lambda m, x: quantize(m, kind="outlier", threshold=2.0),
    "sparse24": lambda m, x: quantize(m, kind="sparse24_int8"),
    "qat": lambda m, x: quantize(m, qat=True, smooth=0.5, calibration=[x]),
    "sparsify": lambda m, x: effvit.sparsify_(m, verbose=False),
    "transposable": lambda m, x: effvit.sparsify_(m, "transposable", verbose=False),
    "sparsify_qat": lambda m, x: (effvit.sparsify_(m, verbose=False), quantize(m, kind="sparse24_int8", qat=True)),
}


def quantize(model, **options):
    return effvit.quantize_(model, verbose=False, progress=False, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("make, size", [(tiny, 64), (tiny_vit, 16)], ids=["swin", "vit"])
def test_patch_after_quantize_or_sparsify(make, size, before, dtype):
    """The check sees the attention, not the rounding around it, and the layers stay what they are."""
    model, x = make().to(dtype), images(2, size, size).to(dtype)
    before(model, x)
    layers = [(name, type(m)) for name, m in model.named_modules() if "inear" in type(m).__name__]
    with torch.no_grad():
        y = model(x)
        report = effvit.patch(model, verbose=False, example=x)
        assert {(r.ok, r.dtype) for r in report.replaced} == {(True, str(dtype).removeprefix("torch."))}, report
        assert float((model(x) - y).norm() / y.norm()) < 0.1
    assert layers == [(name, type(m)) for name, m in model.named_modules() if "inear" in type(m).__name__]


def test_a_wrong_attention_between_int8_layers_is_found(monkeypatch):
    model = tiny_vit()
    quantize(model)
    right = effvit.ops.window_attention

    def wrong(*args, **options):
        y, state = right(*args, **options)
        return y * 1.001, state

    monkeypatch.setattr(effvit.ops, "window_attention", wrong)
    with pytest.raises(VerificationError, match="2 of 2 replacements disagree"):
        effvit.patch(model, verbose=False)
