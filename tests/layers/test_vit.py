"""timm's Attention (ViT, DeiT) patched: which calls are the operator's, and that all compute what timm computes."""

import copy

import pytest
import timm
import timm.models.vision_transformer as timm_vit
import torch
from layer_suite import Record

import effvit
from effvit._accuracy import assert_close_to_truth

VARIANTS = {
    "plain": {},
    "biased": {"qkv_bias": True},
    "normed": {"qk_norm": True, "norm_layer": torch.nn.LayerNorm},
    "scale norm": {"scale_norm": True, "norm_layer": torch.nn.LayerNorm},
    "gated": {"gated": True, "qkv_bias": True},
    "wide heads": {"attn_head_dim": 24},
    "narrow result": {"dim_out": 16},
}


def attention(**options):
    torch.manual_seed(0)
    return timm_vit.Attention(48, num_heads=3, **options)


def patched(module):
    other = copy.deepcopy(torch.nn.Sequential(module))
    effvit.patch(other, verify=False, verbose=False)
    return other[0]


def gradients(module, x, **call):
    x = x.clone().requires_grad_()
    y = module(x, **call)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * weight).sum().backward()
    return {"output": y.detach(), "dx": x.grad} | {name: p.grad for name, p in module.named_parameters()}


def check(module, x, **call):
    """The patched module beside the original and the original in float64; the names of what the former called."""
    other, wide = patched(module), copy.deepcopy(module).double()
    with Record() as calls:
        found = gradients(other, x, **call)
    plain = gradients(copy.deepcopy(module), x, **call)
    call = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
    exact = gradients(wide, x.double(), **call)
    assert found.keys() == exact.keys()
    largest = max(float(t.abs().max()) for t in exact.values())  # gradients are sums over tokens of terms like these
    for name, truth in exact.items():
        magnitude = None if name == "output" else torch.full_like(truth, largest)
        assert_close_to_truth(found[name], truth, plain[name], magnitude=magnitude, eps=torch.finfo(x.dtype).eps)
    return calls.names


@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "plain"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants(options, fused):
    try:
        module = attention(**options)
    except TypeError as error:
        pytest.skip(f"this timm has no such option: {error}")
    module.fused_attn = fused
    assert check(module, torch.randn(2, 50, 48)).count("window_attention") == 1


@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (2, 197)], ids=str)
def test_shapes(shape):
    assert check(attention(), torch.randn(*shape, 48)).count("window_attention") == 1


def test_a_mask_causality_and_dropout_are_timms():
    module, x = attention(), torch.randn(2, 20, 48)
    mask = torch.randn(20, 20)
    assert "window_attention" not in check(module, x, attn_mask=mask)
    assert "window_attention" not in check(module, x, is_causal=True)
    drops = attention(attn_drop=0.5)
    other = patched(drops)
    torch.manual_seed(3)
    expected = drops(x)
    torch.manual_seed(3)
    assert torch.equal(other(x), expected)
    assert check(drops.eval(), x).count("window_attention") == 1


def test_float64_and_no_tokens_are_timms():
    module = attention()
    for x in (torch.randn(2, 20, 48, dtype=torch.float64), torch.randn(2, 0, 48), torch.randn(0, 20, 48)):
        m = module.to(x.dtype)
        assert torch.equal(patched(m)(x), m(x))


def test_very_many_tokens_are_timms():
    torch.manual_seed(0)
    module = timm_vit.Attention(128, num_heads=1).requires_grad_(False)
    for tokens, ours in ((2048, 1), (2049, 0)):
        with Record() as calls:
            patched(module)(torch.randn(1, tokens, 128))
        assert calls.names.count("window_attention") == ours


def test_a_hook_on_the_dropout_fires_where_timms_does():
    for fused in (True, False):
        module, seen = attention(), []
        module.fused_attn = fused
        other = patched(module)
        other.attn_drop.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        other(torch.randn(1, 20, 48))
        assert len(seen) == (not fused)


def test_compiled_with_any_number_of_tokens():
    torch._dynamo.reset()
    module = patched(attention().requires_grad_(False))
    fixed = torch.compile(module, fullgraph=True, dynamic=False)
    x = torch.randn(2, 20, 48)
    torch.testing.assert_close(fixed(x), module(x))
    varying = torch.compile(module, fullgraph=True, dynamic=True)
    for n in (20, 33):
        x = torch.randn(2, n, 48)
        torch.testing.assert_close(varying(x), module(x))
    program = torch.export.export(module, (x,), dynamic_shapes=({1: torch.export.Dim("n", min=2, max=99)},))
    torch.testing.assert_close(program.module()(x[:, :7]), module(x[:, :7]))


def test_deit_small_224_bfloat16_and_float32():
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = timm.create_model("deit_small_patch16_224", depth=2).eval().requires_grad_(False).to(dtype)
        x = torch.randn(1, 3, 224, 224).to(dtype)
        before, exact = model(x), copy.deepcopy(model).double()(x.double())
        effvit.patch(model, verbose=False)
        assert_close_to_truth(model(x), exact, before, magnitude=exact.abs().max().expand_as(exact))


def test_a_quantised_model_keeps_the_attention():
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", depth=1).eval().requires_grad_(False)
    x = torch.randn(1, 3, 224, 224)
    effvit.patch(model, verbose=False)
    effvit.quantize_(model, verbose=False)
    with Record() as calls:
        model(x)
    assert calls.names.count("window_attention") == 1 and calls.names.count("int8_linear") == 4
