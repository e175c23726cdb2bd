"""effvit.layers.LiteMLA and the patched timm model against timm and against the formula."""

import copy

import pytest
import timm
import timm.models.efficientvit_mit as timm_efficientvit
import torch
from layer_suite import DTYPES, absolute_terms, check, check_everything_else, randomise, spread, tokens, with_gradients
from torch import nn

import effvit
from effvit._accuracy import assert_bitwise_equal, assert_close_to_truth
from effvit.layers import LiteMLA
from effvit.layers.efficientvit import LayerNorm2d, RMSNorm2d
from effvit.patch import VerificationError


def plain(m, x):
    """The formula with the scores of all pairs: every group of 3*dim channels is q, k and v of a head."""
    B, _, H, W = x.shape
    qkv = m.qkv(x)
    maps = torch.cat([qkv, *(aggregate(qkv) for aggregate in m.aggreg)], dim=1)
    q, k, v = maps.reshape(B, -1, 3, m.dim, H * W).unbind(2)  # [B, heads, d, N]
    scores = m.kernel_func(q).transpose(-1, -2) @ m.kernel_func(k)
    scores = scores / (scores.sum(-1, keepdim=True) + m.eps)
    return m.proj((v @ scores.transpose(-1, -2)).reshape(B, -1, H, W))


def by_states(m, x):
    """The same in the published order, a state of keys and values first, the denominator a row of it."""
    B, _, H, W = x.shape
    qkv = m.qkv(x)
    maps = torch.cat([qkv, *(aggregate(qkv) for aggregate in m.aggreg)], dim=1)
    q, k, v = maps.reshape(B, -1, 3, m.dim, H * W).unbind(2)
    y = nn.functional.pad(v, (0, 0, 0, 1), value=1.0) @ m.kernel_func(k).mT @ m.kernel_func(q)
    return m.proj((y[:, :, :-1] / (y[:, :, -1:] + m.eps)).reshape(B, -1, H, W))


def pair_of_modules(dtype=torch.float32, **kwargs):
    kwargs = {"in_channels": 24, "out_channels": 20, **kwargs}
    theirs, ours = randomise(timm_efficientvit.LiteMLA(**kwargs)).to(dtype), LiteMLA(**kwargs).to(dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


VARIANTS = {
    "plain": {},
    "two scales, wide heads": {"scales": (3, 5), "dim": 12},
    "one scale": {"scales": ()},
    "heads": {"heads": 2, "dim": 5},
    "biases, norms, activations": {
        "use_bias": (True, False),
        "norm_layer": nn.BatchNorm2d,
        "act_layer": (nn.Hardswish, nn.ReLU),
    },
    "another feature map": {"kernel_func": nn.ReLU6, "eps": 1e-3},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS.keys())
def test_like_timm(kwargs, train, dtype):
    ours, theirs = pair_of_modules(dtype, **kwargs)
    x = tokens(3, 24, 5, 7, dtype=dtype)
    check(ours.train(train), plain, x, yardsticks=[theirs.train(train)], is_map=True)


@pytest.mark.parametrize("size", [(2, 3), (1, 1), (9, 4)], ids=["quadratic form", "one token", "linear form"])
def test_map_sizes(size):
    ours, theirs = pair_of_modules()
    check(ours.eval(), plain, tokens(3, 24, *size), yardsticks=[theirs.eval()], is_map=True)


def test_autocast():
    ours, theirs = pair_of_modules()
    check(
        ours.eval(), plain, tokens(2, 24, 5, 7), yardsticks=[theirs.eval()], autocast=torch.bfloat16, is_map=True
    )  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_is_kept(memory_format):
    ours, _ = pair_of_modules()
    x = tokens(2, 24, 5, 7).contiguous(memory_format=memory_format)
    assert ours.eval()(x).is_contiguous(memory_format=memory_format)
    strided = tokens(2, 48, 5, 7)[:, ::2]
    torch.testing.assert_close(ours(strided), ours(strided.contiguous()))


def test_the_rest():
    make = lambda **factory: LiteMLA(24, 20, **factory)
    check_everything_else(randomise(make()), make, tokens(2, 24, 5, 7))


# ---- effvit.patch ------------------------------------------------------------------------------------------------


def tiny(seed=0):
    torch.manual_seed(seed)
    model = timm_efficientvit.EfficientVit(
        in_chans=3, widths=(8, 8, 16, 16, 32), depths=(1, 1, 1, 1, 1), head_dim=8, num_classes=5, head_widths=(16, 16)
    )
    for module in model.modules():
        if isinstance(module, timm_efficientvit.LiteMLA):
            randomise(module)
    return model.eval()


def exact(model):
    """The model in float64. timm's attention casts to float32 inside: here it runs the formula."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, timm_efficientvit.LiteMLA):
            module.forward = plain.__get__(module)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patched_model(dtype, capsys):
    model, x = tiny().to(dtype), tokens(2, 3, 160, 96, dtype=dtype)
    before, truth = model(x), exact(model)(x.double())
    tensors = {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    report = effvit.patch(model, example=x)
    assert "heads 4x8 scales 5" in capsys.readouterr().out
    assert len(report.replaced) == 3 and report.replaced[-1].name == "(whole model)"
    assert {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]} == tensors
    assert_close_to_truth(model(x), truth, before)
    assert len(effvit.unpatch(model)) == 2
    assert_bitwise_equal(model(x), before)


def test_a_real_model_is_patched():
    torch.manual_seed(0)
    model = timm.create_model("efficientvit_b0", num_classes=7).eval()
    x = tokens(1, 3, 128, 128)
    before, truth = model(x), exact(model)(x.double())
    report = effvit.patch(model, verbose=False)
    assert all(r.ok for r in report) and len(report.replaced) == 4
    assert_close_to_truth(model(x), truth, before)


def test_gradients_of_a_patched_model():
    model, x = tiny(), tokens(2, 3, 96, 64)
    layouts = (torch.contiguous_format, torch.channels_last)
    call = lambda m, x: m(x)
    before = [with_gradients(model, x.contiguous(memory_format=layout), call) for layout in layouts]
    double = exact(model)
    with absolute_terms(double, {}) as terms:
        truth = with_gradients(double, x.double(), call)
    effvit.patch(model, verbose=False)
    after = with_gradients(model, x, call)
    for name, t in truth.items():
        m = t.abs().max().expand_as(t)
        m = torch.maximum(m, terms.get(name, m))
        assert_close_to_truth(after[name], t, [y[name] for y in before], magnitude=m, name=name)


def test_compile_with_dynamic_shapes():
    model = tiny()
    effvit.patch(model, verify=False, verbose=False)
    attention = next(m for m in model.modules() if isinstance(m, timm_efficientvit.LiteMLA))
    torch._dynamo.reset()  # of what other tests compiled of the same code
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    channels = attention.qkv.conv.in_channels
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((5, 7), (8, 6), (12, 11)):
            x = tokens(2, channels, *size)
            torch.testing.assert_close(compiled(x), attention(x))


WRONG = {
    "swapped k, v": lambda op, q, k, v, *a, **kw: op(q, v, k, *a, **kw),
    "another feature map": lambda op, *a, **kw: op(*a, **{**kw, "feature_map": "elu1"}),
    "no normaliser": lambda op, *a, **kw: op(*a, **{**kw, "normalize": "none"}),
    "output off by 1e-4": lambda op, *a, **kw: op(*a, **kw) * (1 + 1e-4),
    "not a number": lambda op, *a, **kw: op(*a, **kw) * float("nan"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_verification_catches_a_wrong_kernel(wrong, monkeypatch):
    model, right = tiny(), effvit.ops.linear_attention
    monkeypatch.setattr(effvit.ops, "linear_attention", lambda *a, **kw: wrong(right, *a, **kw))
    with pytest.raises(VerificationError, match="disagree with the original, the model is unchanged"):
        effvit.patch(model, verbose=False)
    assert effvit.unpatch(model, verbose=False) == []


def test_an_instance_that_cannot_be_replaced_says_why():
    model = tiny()
    attention = [m for m in model.modules() if isinstance(m, timm_efficientvit.LiteMLA)]
    attention[0]._attn = attention[0]._attn
    attention[1].__class__ = type("Mine", (timm_efficientvit.LiteMLA,), {})
    with pytest.raises(ValueError, match=r"replaced on the instance.*a subclass of LiteMLA"):
        effvit.patch(model, verbose=False)


def test_vmap():
    m, x = randomise(LiteMLA(16, 12)).eval(), tokens(3, 2, 16, 5, 7)
    torch.testing.assert_close(torch.vmap(m)(x), torch.stack([m(t) for t in x]))


# ---- MIT's own code ----------------------------------------------------------------------------------------------

MITS = {
    "defaults": {"norm": (None, "bn2d")},
    "names": {"norm": "bn2d", "act_func": ("hswish", "relu6"), "kernel_func": "relu6", "use_bias": (True, False)},
    "layer norm, gelu": {"norm": (None, "ln2d"), "act_func": (None, "gelu"), "kernel_func": "silu", "eps": 0.5},
    "rms norm, silu": {"norm": ("trms2d", None), "act_func": ("silu", None), "use_bias": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", MITS.values(), ids=MITS.keys())
def test_like_mit(kwargs, dtype):
    m = randomise(LiteMLA(24, 20, **kwargs)).to(dtype)
    assert m.eps == kwargs.get("eps", 1e-15)
    # Denominators of silu come near 0, which makes much of every rounding.
    check(m.eval(), plain, tokens(3, 24, 5, 7, dtype=dtype), also=[by_states], is_map=True)


def test_names_of_mit_are_the_classes_of_timm():
    """In whatever argument they come: positions are the same in both constructors."""
    bias = (True, False)
    named = randomise(LiteMLA(24, 20, 2, 1.0, 5, bias, (None, "bn2d"), ("relu", "hswish"), "relu6", (3, 5), 1e-15))
    others = (
        LiteMLA(24, 20, 2, 1.0, 5, bias, (None, nn.BatchNorm2d), (nn.ReLU, nn.Hardswish), nn.ReLU6, (3, 5), 1e-15),
        LiteMLA(
            24, 20, 2, dim=5, use_bias=bias, norm=(None, "bn2d"), act_func=("relu", "hswish"), kernel_func="relu6",
            scales=(3, 5),
        ),
    )  # fmt: skip
    x = tokens(2, 24, 5, 7)
    for other in others:
        other.load_state_dict(named.state_dict(), strict=True)
        assert_bitwise_equal(other.eval()(x), named.eval()(x))


def test_state_dict_of_mit():
    names = ["qkv.conv.weight", "qkv.conv.bias", "aggreg.0.0.weight", "aggreg.0.0.bias", "aggreg.0.1.weight"]
    names += ["aggreg.0.1.bias", "proj.conv.weight", "proj.norm.weight", "proj.norm.bias"]
    statistics = [f"proj.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
    for norm, expected in (("bn2d", names + statistics), ("ln2d", names), ("trms2d", names), (None, names[:-2])):
        assert list(LiteMLA(24, 20, use_bias=(True, False), norm=(None, norm)).state_dict()) == expected


def test_which_eps():
    assert LiteMLA(24, 20).eps == timm_efficientvit.LiteMLA(24, 20).eps == 1e-5
    for kwargs in ({"norm": None}, {"act_func": None}, {"kernel_func": "relu"}, {"norm_layer": (None, "bn2d")}):
        assert LiteMLA(24, 20, **kwargs).eps == 1e-15
        assert LiteMLA(24, 20, **kwargs, eps=1e-5).eps == 1e-5
    assert isinstance(LiteMLA(24, 20, norm=None).proj.norm, nn.Identity)
    # Queries of nearly no weight: what eps is decides what they get
    mits, timms = (randomise(LiteMLA(24, 20, norm=None, eps=eps)) for eps in (1e-15, 1e-5))
    x = tokens(2, 24, 5, 7) * 1e-5
    assert timms(x).norm() < 0.1 * mits(x).norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [LayerNorm2d, RMSNorm2d])
def test_norms_of_channels(kind, dtype):
    def formula(m, x):
        centred = x - x.mean(1, keepdim=True) if kind is LayerNorm2d else x
        normalised = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        weight, bias = (spread(m, name, (3, 5, 7, 24)).permute(0, 3, 1, 2) for name in ("weight", "bias"))
        return normalised * weight + bias

    check(randomise(kind(24)).to(dtype), formula, tokens(3, 24, 5, 7, dtype=dtype) + 1, is_map=True)


def test_bad_names():
    with pytest.raises(
        ValueError, match=r"LiteMLA: norm must be None, a class or one of \['bn2d', 'ln2d', 'trms2d'\], got 'ln'"
    ):
        LiteMLA(24, 20, norm="ln")
    with pytest.raises(ValueError, match="LiteMLA: act_func must be None, a class or one of .* got 'swish'"):
        LiteMLA(24, 20, act_layer=(None, "swish"))
    with pytest.raises(ValueError, match="LiteMLA: kernel_func must be .* got 'exp'"):
        LiteMLA(24, 20, kernel_func="exp")
    with pytest.raises(ValueError, match="LiteMLA: scales must be odd, got 4"):
        LiteMLA(24, 20, scales=(3, 4))


def test_no_heads():
    with pytest.raises(ValueError, match="effvit::LiteMLA: heads must be >= 1, got 0"):
        LiteMLA(4, 12)
