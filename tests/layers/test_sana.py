"""effvit.layers.LiteLA, LiteLAReLURope, SanaLinearAttention and the processors against the papers' formulas."""

import functools

import pytest
import torch
from layer_suite import DTYPES, FORMS, attend, check, check_everything_else, check_forms, randomise, tokens

from effvit._accuracy import assert_bitwise_equal
from effvit.layers import (
    LiteLA,
    LiteLAReLURope,
    PAGCFGSanaLinearAttnProcessor,
    PAGIdentitySanaLinearAttnProcessor,
    SanaLinearAttention,
    SanaLinearAttnProcessor,
    sana_attn_processors,
)


def relu_attention(q, k, v, heads, form, before=None, numerator=None):
    """[B, L, C], [B, M, C], [B, M, C] -> [B, L, C].

    `before` and `numerator` are angles [N, d/2] by which q and k are turned before the ReLU, or after it and for the
    numerator alone.
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    if before is not None:
        q, k = turn(q, before), turn(k, before)
    q, k = q.relu(), k.relu()
    q_den, k_den = q, k
    if numerator is not None:
        q, k = turn(q, numerator), turn(k, numerator)
    return attend(q, k, v, lambda s: s + 1e-15, q_den, k_den, form).transpose(1, 2).flatten(2)


def turn(x, angles):
    """Channel pairs of x [B, h, N, d] multiplied by cos + i sin, in float32 or float64 as published."""
    cos, sin = angles.cos(), angles.sin()
    a, b = (t if t.dtype == torch.float64 else t.float() for t in (x[..., 0::2], x[..., 1::2]))
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def some_angles(N, d):
    return torch.arange(N, dtype=torch.float64)[:, None] * 100.0 ** -(torch.arange(d // 2) / (d // 2))


def pairs(angles):
    """cos and sin [N, d] with every value twice, as SANA's RopePosEmbed returns them."""
    return tuple(t.repeat_interleave(2, dim=1).float() for t in (angles.cos(), angles.sin()))


def rms_norm(x, module, eps):
    if module is None or isinstance(module, torch.nn.Identity):
        return x
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * module.weight


def plain_lite(m, x, form="pairs", **angles):
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    q, k = rms_norm(q, m.q_norm, 1e-5), rms_norm(k, m.k_norm, 1e-5)
    return m.proj(relu_attention(q, k, v, m.in_dim // m.dim, form, **angles))


def plain_diffusers(m, x, context=None, form="pairs", **angles):
    context = x if context is None else context
    q, k = rms_norm(m.to_q(x), m.norm_q, 1e-5), rms_norm(m.to_k(context), m.norm_k, 1e-5)
    return m.to_out[0](relu_attention(q, k, m.to_v(context), m.heads, form, **angles))


def check_lite(m, x, **kwargs):
    return check_forms(m, plain_lite, x, **kwargs)


def check_diffusers(m, x, **kwargs):
    return check_forms(m, plain_diffusers, x, **kwargs)


LITE = {
    "plain": {},
    "qk_norm, bias": {"qk_norm": True, "use_bias": True},
    "heads": {"heads": 2},
    "heads_ratio": {"heads_ratio": 0.5},
}
DIFFUSERS = {
    "plain": {},
    "qk_norm, bias": {"qk_norm": "rms_norm_across_heads", "bias": True, "out_bias": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", LITE.values(), ids=LITE.keys())
def test_lite_la(kwargs, dtype):
    m = randomise(LiteLA(24, 24, **{"dim": 6, **kwargs})).to(dtype)
    check_lite(m, tokens(3, 35, 24, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kwargs", DIFFUSERS.values(), ids=DIFFUSERS.keys())
def test_diffusers(kwargs, dtype):
    m = randomise(SanaLinearAttention(20, heads=3, dim_head=8, **kwargs)).to(dtype)
    check_diffusers(m, tokens(3, 35, 20, dtype=dtype))


@pytest.mark.parametrize("length", [4, 30], ids=["quadratic form", "linear form"])
def test_cross_attention(length):
    m = randomise(SanaLinearAttention(20, cross_attention_dim=12, heads=3, dim_head=8))
    context = tokens(3, length, 12, seed=2)

    def reorder(x):  # check() also runs the batch in reverse
        flipped = torch.equal(x.float(), tokens(3, 17, 20).flip(0))
        return (context.flip(0) if flipped else context).to(x.dtype)

    plain = lambda m, x, form="pairs": plain_diffusers(m, x, reorder(x), form)
    check_forms(m, plain, tokens(3, 17, 20), call=lambda m, x: m(x, reorder(x)))


@pytest.mark.parametrize("length", [5, 40], ids=["quadratic form", "linear form"])
def test_autocast(length):
    check_lite(randomise(LiteLA(24, 24, dim=8, qk_norm=True)), tokens(2, length, 24), autocast=torch.bfloat16)
    m = randomise(SanaLinearAttention(24, heads=3, dim_head=8, qk_norm="rms_norm_across_heads"))
    check_diffusers(m, tokens(2, length, 24), autocast=torch.bfloat16)


def test_parameter_names_are_the_originals():
    lite = {"qkv.weight", "proj.weight", "proj.bias"}
    assert set(LiteLA(24, 24, dim=8).state_dict()) == lite
    assert set(LiteLA(24, 24, dim=8, qk_norm=True).state_dict()) == lite | {"q_norm.weight", "k_norm.weight"}
    diffusers = {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}
    assert set(SanaLinearAttention(24).state_dict()) == diffusers
    normed = SanaLinearAttention(24, qk_norm="rms_norm_across_heads")
    assert set(normed.state_dict()) == diffusers | {"norm_q.weight", "norm_k.weight"}


def test_queries_without_a_positive_feature_attend_to_nothing():
    m = randomise(LiteLA(24, 24, dim=8))
    y = m(torch.cat([tokens(1, 20, 24), torch.zeros(1, 1, 24)], dim=1))
    assert_bitwise_equal(y[0, 20], m.proj.bias)


def test_float16_overflow_becomes_the_largest_float16():
    m = LiteLA(8, 8, dim=8).half()
    with torch.no_grad():
        m.qkv.weight.copy_(torch.eye(8).repeat(3, 1))
        m.proj.weight.copy_(torch.eye(8) * 60000)
        m.proj.bias.zero_()
    assert m(torch.full((1, 16, 8), 4.0).half()).unique().tolist() == [65504.0]


def test_float16_does_not_overflow_inside():
    """The sums over keys exceed float16; their ratio does not."""
    m = LiteLA(8, 8, dim=8).half()
    with torch.no_grad():
        m.qkv.weight.copy_(torch.eye(8).repeat(3, 1))
        m.proj.weight.copy_(torch.eye(8))
        m.proj.bias.zero_()
    x = torch.full((1, 4096, 8), 100.0).half()
    torch.testing.assert_close(m(x), x)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"LiteLA: in_dim must be a multiple of the head dim 8, got 20"):
        LiteLA(20, 24, dim=8)
    with pytest.raises(ValueError, match=r"qk_norm must be None or 'rms_norm_across_heads', got 'layer_norm'"):
        SanaLinearAttention(24, qk_norm="layer_norm")


@pytest.mark.parametrize("make", [
    lambda **factory: LiteLA(24, 24, dim=8, qk_norm=True, **factory),
    lambda **factory: SanaLinearAttention(24, heads=3, dim_head=8, qk_norm="rms_norm_across_heads", **factory),
], ids=["LiteLA", "SanaLinearAttention"])  # fmt: skip
def test_the_rest(make):
    check_everything_else(randomise(make()), make, tokens(2, 35, 24))


@pytest.mark.parametrize("autocast", [False, True])
def test_heads_wider_than_the_operators_take_sum_in_float32(autocast):
    m, x = randomise(LiteLA(320, 320, heads=1)).eval(), tokens(1, 4096, 320)
    truth = plain_lite(m.double(), x.double(), form="state")
    m = m.float() if autocast else m.half()
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        y = m(x if autocast else x.half())
    assert y.dtype == torch.float16 and y.isfinite().all()
    assert (y - truth).norm() < 2e-3 * truth.norm()


def test_no_heads():
    with pytest.raises(ValueError, match="effvit::LiteLA: heads must be >= 1, got 0"):
        LiteLA(24, 24)


N, ANGLES = 35, some_angles(35, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["rotary_emb", "image_rotary_emb"])
def test_lite_la_rotates_before_the_relu(name, dtype):
    m = randomise(LiteLA(24, 24, dim=8, qk_norm=True)).to(dtype)
    call = lambda m, x: m(x, HW=(5, 7), block_mask=torch.zeros(N, N), **{name: pairs(ANGLES)})
    check_forms(m, functools.partial(plain_lite, before=ANGLES), tokens(3, N, 24, dtype=dtype), call=call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lite_la_relu_rope_rotates_the_numerator(dtype):
    m = randomise(LiteLAReLURope(24, 24, dim=8, qk_norm=True)).to(dtype)
    freqs = torch.polar(torch.ones_like(ANGLES), ANGLES)[None, None]
    call = lambda m, x: m(x, HW=(1, 5, 7), rotary_emb=freqs, chunk_index=[0], save_kv_cache=False)
    check_forms(m, functools.partial(plain_lite, numerator=ANGLES), tokens(3, N, 24, dtype=dtype), call=call)


def test_rotary_embeddings_of_another_kind_are_refused():
    cos, sin = pairs(ANGLES)
    freqs = torch.polar(torch.ones_like(ANGLES), ANGLES)[None, None]
    m, video, x = LiteLA(24, 24, dim=8), LiteLAReLURope(24, 24, dim=8), tokens(2, N, 24)
    pair = r"LiteLA: rotary_emb must be a pair \(cos, sin\), \[35, 8\] each, got"
    number = r"LiteLAReLURope: rotary_emb must be complex \[1, 1, 35, 4\], got"
    for call, error, message in (
        (lambda: m(x, rotary_emb=freqs), TypeError, f"{pair} Tensor"),
        (lambda: m(x, rotary_emb=(cos,)), TypeError, f"{pair} tuple"),
        (lambda: m(x, rotary_emb=(cos, sin[:34])), ValueError, rf"{pair} \[35, 8\] and \[34, 8\]"),
        (lambda: m(x, rotary_emb=(cos, sin), image_rotary_emb=(cos, sin)), ValueError, "rotary_emb must be None when"),
        (lambda: video(x), TypeError, f"{number} NoneType"),
        (lambda: video(x, rotary_emb=cos), TypeError, f"{number} torch.float32"),
        (lambda: video(x, rotary_emb=freqs[:, :, 1:]), ValueError, rf"{number} \[1, 1, 34, 4\]"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_the_originals_processors_find_what_they_call():
    """They take the layer apart: projections and norms, `kernel_func`, `attn_matmul` of maps [B, h, d, N]."""
    m, x = randomise(LiteLA(24, 24, dim=8, qk_norm=True)), tokens(2, N, 24)
    q, k, v = m.qkv(x).reshape(2, N, 3, 24).unbind(2)
    q, k, v = (t.transpose(1, 2).reshape(2, 3, 8, N) for t in (m.q_norm(q), m.k_norm(k), v))
    out = m.attn_matmul(m.kernel_func(q), m.kernel_func(k).transpose(-1, -2), v)
    assert_bitwise_equal(m.proj(out.view(2, 24, N).permute(0, 2, 1)), m(x))


class Attention(SanaLinearAttention):
    """diffusers' Attention, as far as SANA's processors see it: parameters, heads, norms, and how it calls them."""

    is_cross_attention = False

    def __init__(self, processor, **kwargs):
        super().__init__(20, heads=3, dim_head=8, **kwargs)
        self.processor = processor

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        return self.processor(
            self, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **kwargs
        )


def perturbed(m, x, form="pairs", parts=2):
    """The last of `parts` of the batch attends to itself; diffusers leaves the norms out."""
    parts = x.chunk(parts)
    org = torch.cat(parts[:-1])
    out = relu_attention(m.to_q(org), m.to_k(org), m.to_v(org), m.heads, form)
    return torch.cat([m.to_out[0](out), m.to_out[0](m.to_v(parts[-1]))])


PROCESSORS = {
    "SANA": (SanaLinearAttnProcessor, plain_diffusers, {}),
    "SANA-Video": (
        SanaLinearAttnProcessor, functools.partial(plain_diffusers, numerator=ANGLES),
        {"rotary_emb": tuple(t[None, :, None] for t in pairs(ANGLES))},
    ),
    "PAG": (PAGIdentitySanaLinearAttnProcessor, perturbed, {}),
    "PAG, CFG": (PAGCFGSanaLinearAttnProcessor, functools.partial(perturbed, parts=3), {}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("processor, plain, kwargs", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_processors(processor, plain, kwargs, dtype):
    m = randomise(Attention(processor(), qk_norm="rms_norm_across_heads")).to(dtype)
    batch = tokens(6, N, 20, dtype=dtype)

    def in_order(form):  # check() also runs the batch in reverse, where other images are perturbed
        formula = functools.partial(plain, form=form)
        return lambda m, x: formula(m, x) if torch.equal(x, batch.to(x.dtype)) else formula(m, x.flip(0)).flip(0)

    also = [in_order(form) for form in FORMS[1:]]
    check(m, in_order(FORMS[0]), batch, also=also, call=lambda m, x: m(x, **kwargs))


def test_a_models_processors_are_replaced_by_name():
    class SanaLinearAttnProcessor2_0:
        pass

    class SanaLinearAttnProcessor3_0:
        pass

    class PAGCFGSanaLinearAttnProcessor2_0:
        pass

    class PAGIdentitySanaLinearAttnProcessor2_0:
        pass

    class SanaAttnProcessor2_0:
        pass

    cross = SanaAttnProcessor2_0()
    replaced = sana_attn_processors({
        "0.attn1": SanaLinearAttnProcessor2_0(), "0.attn2": cross, "1.attn1": SanaLinearAttnProcessor3_0(),
        "2.attn1": PAGCFGSanaLinearAttnProcessor2_0(), "3.attn1": PAGIdentitySanaLinearAttnProcessor2_0(),
    })  # fmt: skip
    assert replaced["0.attn2"] is cross
    assert {name: type(p) for name, p in replaced.items() if p is not cross} == {
        "0.attn1": SanaLinearAttnProcessor, "1.attn1": SanaLinearAttnProcessor,
        "2.attn1": PAGCFGSanaLinearAttnProcessor, "3.attn1": PAGIdentitySanaLinearAttnProcessor,
    }  # fmt: skip


@pytest.mark.parametrize("processor, parts", [
    (SanaLinearAttnProcessor, None), (PAGIdentitySanaLinearAttnProcessor, 2), (PAGCFGSanaLinearAttnProcessor, 3),
])  # fmt: skip
def test_processors_refuse(processor, parts):
    m = Attention(processor())
    if parts is not None:
        with pytest.raises(ValueError, match=rf"{processor.__name__}: hidden_states must be a batch of a multiple of"):
            m(tokens(2 * parts + 1, 4, 20))
    m.is_cross_attention = True
    with pytest.raises(ValueError, match=rf"{processor.__name__}: attn must be self-attention"):
        m(tokens(6, 4, 20), tokens(6, 5, 20))


@pytest.mark.parametrize("name", ["SANA-Video", "PAG, CFG"])
def test_processors_compile(name):
    processor, _, kwargs = PROCESSORS[name]
    m, x = randomise(Attention(processor(), qk_norm="rms_norm_across_heads")), tokens(6, N, 20)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, **kwargs), m(x, **kwargs), rtol=1e-4, atol=1e-5)
