"""Int8Attention, Int8KVCache, quantize_(attention="int8") in timm's ViT and Swin, and transformers' interface."""

import copy
import math
import pickle
import types

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import swin_transformer as timm_swin
from timm.models import vision_transformer as timm_vit

import effvit
from effvit._accuracy import assert_bitwise_equal
from effvit.layers import Int8Attention, Int8KVCache
from effvit.layers.int8_attention import as_bias, int8_attention_forward
from effvit.reference.int8_attention import BLOCK, float_attention

VARIANTS = {
    "plain": {},
    "biased": {"qkv_bias": True},
    "normed": {"qk_norm": True, "norm_layer": torch.nn.LayerNorm},
    "scale norm": {"scale_norm": True, "norm_layer": torch.nn.LayerNorm},
    "gated": {"gated": True, "qkv_bias": True},
    "wide heads": {"attn_head_dim": 24},
}


def close(x, y):
    return F.cosine_similarity(x.double().flatten(), y.double().flatten(), dim=0) > 0.999


def quantised(module):
    """timm's module with nothing but its attention changed."""
    model = torch.nn.Sequential(copy.deepcopy(module), torch.nn.Linear(4, 4))
    effvit.quantize_(model, attention="int8", skip=("*qkv", "*proj", "*gate"), verbose=False)
    return model[0]


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qk_norm": True, "attn_head_dim": 24}])
def test_layer_is_timms(options):
    layer = Int8Attention(48, num_heads=3, **options)
    other = timm_vit.Attention(48, num_heads=3, norm_layer=torch.nn.LayerNorm, **options)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(2, 70, 48)
    mask = torch.rand(2, 1, 70, 70) > 0.3
    for call in ({}, {"is_causal": True}, {"attn_mask": mask}):
        assert close(layer(x, **call), other(x, **call)), call


def test_layer_is_the_operator():
    layer = Int8Attention(32, num_heads=2, smooth_k=False, exponential="shiftmax")
    x = torch.randn(2, 20, 32)
    q, k, v = layer.qkv(x).view(2, 20, 3, 2, 16).unbind(2)
    y = effvit.int8_attention(q, k, v, smooth_k=False, exponential="shiftmax")
    assert_bitwise_equal(layer(x), layer.proj(y.flatten(2)))


def test_layer_trains_and_refuses():
    layer, x = Int8Attention(32, num_heads=2), torch.randn(2, 20, 32)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads = 3, got 32"):
        Int8Attention(32, num_heads=3)


def test_masks():
    q = torch.randn(4, 5, 2, 8)
    assert as_bias(None, q, 7) is None
    for shape in ((5, 7), (4, 5, 7), (1, 1, 5, 7), (4, 1, 1, 7), (4, 2, 5, 7), (2, 5, 1)):
        mask = torch.rand(shape) > 0.5
        bias = as_bias(mask, q, 7)
        expected = torch.where(mask, 0.0, -math.inf)
        expected = expected[:, None] if len(shape) == 3 else expected
        assert bias.shape[1:] == (2, 5, 7) and torch.equal(bias, expected.expand(bias.shape))
    assert torch.equal(as_bias(torch.ones(5, 7, dtype=torch.int64), q, 7), torch.ones(1, 2, 5, 7))


# ---- the cache -------------------------------------------------------------------------------------------------------


def tokens(n, B=2, G=2, K=16, V=24, offset=3.0):
    return torch.randn(B, n, G, K) + offset * torch.randn(B, 1, G, K), torch.randn(B, n, G, V)


@pytest.mark.parametrize("steps", [[1] * 5, [70, 1, 1, 60, 64, 3], [200], [64, 64, 1], [63, 2, 63]])
def test_cache_is_what_one_call_makes(steps):
    """Token by token or at once: the same integers and scales, and bitwise what the operator makes of the floats."""
    n = sum(steps)
    k, v = tokens(n)
    mean = k[:, : steps[0]].mean(1)
    cache, at = Int8KVCache(k_mean=mean), 0
    for step in steps:
        cache.append(k[:, at : at + step], v[:, at : at + step])
        at += step
        assert cache.length == at and cache.tensors[0].shape[1] == at
    once = Int8KVCache(k_mean=mean).append(k, v)
    for i, (a, b) in enumerate(zip(cache.tensors, once.tensors, strict=True)):
        assert_bitwise_equal(a, b, name=f"tensor {i}")
    for L in (1, 9):
        q = torch.randn(2, L, 4, 16)
        assert_bitwise_equal(cache.attend(q), effvit.int8_attention(q, k, v, k_mean=mean))
    for x, exact, bound in zip(cache.dequantised(), (k, v), (2e-2, 2e-2), strict=True):
        assert (x - exact).abs().max() < bound * exact.abs().max()


def test_cache_streams():
    """Decoding: a query a step over all tokens so far."""
    k, v = tokens(150)
    q = torch.randn(2, 150, 4, 16)
    cache = Int8KVCache()
    for t in range(150):
        out = cache.append(k[:, t : t + 1], v[:, t : t + 1]).attend(q[:, t : t + 1], causal=True)
        if t % 37 == 36:
            exact = float_attention(*(x.double() for x in (q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1])),
                                    scale=0.25, causal=False)[0]  # fmt: skip
            assert close(out, exact), t
    assert cache.nbytes < 0.6 * (k.numel() + v.numel()) * 4  # room to grow and the last block in floats included


def test_cache_evicts():
    """The oldest whole blocks after the sink go; what is left is as if it had never been with others."""
    k, v = tokens(500, offset=0.0)
    cache, mean = Int8KVCache(max_length=256, sink=64, k_mean=k.mean(1)), k.mean(1)
    for t in range(0, 500, 50):
        cache.append(k[:, t : t + 50], v[:, t : t + 50])
        assert cache.length <= 256
    gone = 500 - cache.length
    assert gone % BLOCK == 0 and gone == 256
    kept = torch.cat((torch.arange(64), torch.arange(64 + gone, 500)))
    q = torch.randn(2, 3, 2, 16)
    assert_bitwise_equal(cache.attend(q), effvit.int8_attention(q, k[:, kept], v[:, kept], k_mean=mean))
    cache.reset()
    assert cache.length == 0 and cache.append(k[:, :5], v[:, :5]).length == 5


def test_cache_in_the_layer():
    layer, x = Int8Attention(32, num_heads=2), torch.randn(1, 130, 32)
    cache = Int8KVCache()
    with torch.no_grad():
        parts = [layer(x[:, :100], is_causal=True, cache=cache)]
        parts += [layer(x[:, t : t + 10], is_causal=True, cache=cache) for t in range(100, 130, 10)]
        assert cache.length == 130 and close(torch.cat(parts, 1), layer(x, is_causal=True))


def test_cache_refuses():
    for options, match in (({"max_length": 100}, "max_length must be a multiple of 64, got 100"),
                           ({"sink": 1.0}, "sink must be a multiple of 64, got 1.0"),
                           ({"max_length": 128, "sink": 128}, r"max_length must be at least sink \+ 64")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            Int8KVCache(**options)
    cache, (k, v) = Int8KVCache(), tokens(5)
    with pytest.raises(ValueError, match="tensors must be read after tokens were appended"):
        cache.tensors  # noqa: B018
    with pytest.raises(TypeError, match=r"Int8KVCache.append: k must be float32, bfloat16 or float16, got torch.int8"):
        cache.append(k.to(torch.int8), v)
    with pytest.raises(ValueError, match=r"v must be \[B, T, G, V\] like k \[2, 5, 2, 16\], got \[2, 4, 2, 24\]"):
        cache.append(k, v[:, :4])
    cache.append(k, v)
    with pytest.raises(ValueError, match="k must be .*like the tokens before"):
        cache.append(k[..., :8], v)
    assert cache.append(k[:, :0], v[:, :0]).length == 5


# ---- quantize_ -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_timm_attention(options):
    torch.manual_seed(0)
    module = timm_vit.Attention(48, num_heads=3, **options).eval()
    other, x = quantised(module), torch.randn(2, 70, 48)
    assert type(other).__name__ == "Int8ViTAttention"
    with torch.no_grad():
        for call in ({}, {"is_causal": True}, {"attn_mask": torch.rand(70, 70) > 0.3}):
            y = other(x, **call)
            assert close(y, module(x, **call)) and not torch.equal(y, module(x, **call)), call
        assert_bitwise_equal(other.double()(x.double()), module.double()(x.double()))  # is timm's


def test_timm_windows():
    """Windows of a shifted map: the bias table, and a mask for each window of an image."""
    block = timm_swin.SwinTransformerBlock(32, (14, 14), num_heads=2, window_size=7, shift_size=3).eval()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    other, x = copy.deepcopy(block), torch.randn(3, 14, 14, 32)
    other.attn = quantised(block.attn)
    with torch.no_grad():
        assert type(other.attn).__name__ == "Int8WindowAttention"
        assert close(other._attn(x), block._attn(x))
        windows = torch.randn(12, 49, 32)
        q, k, v = block.attn.qkv(windows).unflatten(-1, (3, 2, 16)).unbind(2)
        bias = block.attn._get_rel_pos_bias() + block.attn_mask[:, None]
        y = effvit.int8_attention(q, k, v, bias=bias).flatten(2)
        assert_bitwise_equal(other.attn(windows, block.attn_mask), block.attn.proj(y))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_models_and_the_way_back(name, tmp_path):
    options = {"depths": (1, 1, 2, 1)} if "swin" in name else {"depth": 2}
    model = timm.create_model(name, num_classes=5, **options).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(x)
        changed = copy.deepcopy(model)
        report = effvit.quantize_(changed, attention="int8", verbose=False)
        rows = [r for r in report if "int8_attention" in r.detail]
        assert len(rows) == sum("Attention" in type(m).__name__ for m in model.modules())
        assert "int8_attention" in str(report)
        after = changed(x)
        assert close(after, before) and not torch.equal(after, before)
        for other in (copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
            assert_bitwise_equal(other(x), after)
        path = tmp_path / "model.safetensors"
        effvit.save_quantized(changed, path)
        loaded = effvit.load_quantized_(timm.create_model(name, num_classes=5, **options).eval(), path)
        assert_bitwise_equal(loaded(x), after)
        with pytest.raises(ValueError, match="must have kept its float layers"):
            effvit.unquantize_(loaded)
        assert {r.name for r in rows} <= set(effvit.unquantize_(changed, verbose=False))
        assert_bitwise_equal(changed(x), before)


def test_quantize_options():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=2)
    with pytest.raises(ValueError, match="attention must be one of float, int8, got 'int4'"):
        effvit.quantize_(model, attention="int4")
    report = effvit.quantize_(model, attention="int8", skip=("blocks.0.*",), verbose=False)
    details = {r.name: r.detail for r in report}
    assert details["blocks.0.attn"] == "skipped by the pattern 'blocks.0.*'" and "int8" in details["blocks.1.attn"]
    model.blocks[1].attn.attn_drop.p = 0.5
    assert type(model.blocks[1].attn).__name__ == "Int8ViTAttention"
    model.train()(torch.randn(1, 3, 224, 224)).sum().backward()  # with dropout it is timm's own forward


class Mine(timm_vit.Attention):
    """A subclass, which may compute something else."""


def test_subclasses_are_told():
    model = torch.nn.Sequential(Mine(48, num_heads=3), torch.nn.Linear(4, 4))
    report = effvit.quantize_(model, attention="int8", kind="float", verbose=False)
    assert {r.name: r.detail for r in report}["0"] == "a subclass of Attention, which may compute something else"
    assert type(model[0]) is Mine


def test_models_without_timms_attention_are_refused():
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(48, 3), torch.nn.Linear(4, 4))
    expected = "attention must be int8 for a model with timm's Attention or WindowAttention, got torch.Sequential"
    with pytest.raises(ValueError, match=f"^effvit::quantize_: {expected}$"):
        effvit.quantize_(model, attention="int8", verbose=False)
    assert type(model[1]) is torch.nn.Linear
    effvit.quantize_(model, verbose=False)


def test_files_of_attention_alone(tmp_path):
    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(timm_vit.Attention(48, num_heads=3), torch.nn.Linear(48, 4)).eval()

    model, x, path = make(), torch.randn(2, 20, 48), tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="save_quantized: model must have quantised layers"):
        effvit.save_quantized(model, path)
    effvit.quantize_(model, attention="int8", kind="float", verbose=False)
    effvit.quantize_(model, attention="int8", kind="float", verbose=False)  # there is nothing left to change
    effvit.save_quantized(model, path)
    loaded = effvit.load_quantized_(make(), path)
    with torch.no_grad():
        assert_bitwise_equal(loaded(x), model(x))
        assert not torch.equal(loaded(x), make()(x))


# ---- transformers ----------------------------------------------------------------------------------------------------


def test_interface():
    """[B, H, L, K] -> [B, L, H, V], masks of any kind, causal as the module says, grouped heads."""
    q, k, v = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    module = types.SimpleNamespace(is_causal=True)
    repeated = [t.repeat_interleave(2, 1) for t in (k, v)]
    mask = torch.where(torch.rand(2, 1, 20, 20) > 0.3, 0.0, torch.finfo(torch.float32).min)
    for call, expected in (({}, {"is_causal": True}), ({"is_causal": False}, {}),
                           ({"attention_mask": mask}, {"attn_mask": mask}),
                           ({"attention_mask": mask == 0}, {"attn_mask": mask}),
                           ({"scaling": 0.5}, {"scale": 0.5, "is_causal": True})):  # fmt: skip
        out, none = int8_attention_forward(module, q, k, v, **({"attention_mask": None} | call))
        exact = F.scaled_dot_product_attention(q, *repeated, **expected).transpose(1, 2)
        assert none is None and out.shape == (2, 20, 4, 16) and close(out, exact), call
    one, _ = int8_attention_forward(module, q[:, :, -1:], k, v, None)  # a step of decoding sees all
    assert close(one, F.scaled_dot_product_attention(q[:, :, -1:], *repeated).transpose(1, 2))
    for name, value in (("dropout", 0.1), ("softcap", 30.0), ("position_bias", mask)):
        with pytest.raises(ValueError, match=f"int8_attention_forward: {name} must be"):
            int8_attention_forward(module, q, k, v, None, **{name: value})


def test_transformers_knows_it():
    transformers = pytest.importorskip("transformers", minversion="4.53")
    config = transformers.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                    image_size=64, patch_size=8)  # fmt: skip
    model, x = transformers.ViTModel(config).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(x).last_hidden_state
        model.set_attn_implementation("effvit_int8")
        after = model(x).last_hidden_state
    assert close(after, before) and not torch.equal(after, before)
