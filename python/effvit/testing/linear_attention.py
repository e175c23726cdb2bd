"""linear_attention's samples, bad inputs and error magnitudes."""

import math

import torch

from effvit.ops.linear_attention import FEATURE_MAPS, NORMALIZERS
from effvit.reference.linear_attention import FEATURE_MAPS as PHI
from effvit.reference.linear_attention import linear_attention as definition
from effvit.testing._samples import (
    IS_FLOAT,
    IS_FLOAT32,
    IS_TENSOR,
    changed,
    every_other,
    in_order,
    misaligned,
    sliced,
    to,
)  # fmt: skip
from effvit.testing._spec import FLOAT_DTYPES, OPS, BadInput, OpSpec, Sample, split_call

NAME = "linear_attention"
TENSORS = OPS[NAME].names
NONE, RELU, ELU1, EXP = range(4)  # feature maps
PLAIN, SUM, MEAN, CLAMP = range(4)  # normalisers
# Backends that take samples in one dtype take the first.
FLOAT16_FIRST = (torch.float16, torch.float32, torch.bfloat16)


def reference_call(*args, **kwargs):
    """The definition, with the schema's ints."""
    kwargs = dict(kwargs)
    kwargs["feature_map"] = FEATURE_MAPS[kwargs.get("feature_map", RELU)]
    kwargs["normalize"] = NORMALIZERS[kwargs.get("normalize", SUM)]
    return definition(*args, **kwargs)


def public_call(q, k, v, *optionals, **kwargs):
    """The same call of effvit.linear_attention, with its strings: `out` alone, whichever form it chooses."""
    import effvit

    kwargs = {n: x for n, x in kwargs.items() if n != "quadratic"}
    kwargs["feature_map"] = FEATURE_MAPS[kwargs.get("feature_map", RELU)]
    kwargs["normalize"] = NORMALIZERS[kwargs.get("normalize", SUM)]
    return effvit.linear_attention(q, k, v, *optionals, **kwargs)


# ---- samples -------------------------------------------------------------------------------------------------------


def _packed(q, k, v):
    """Slices of one projection [B, L, 3, H, D]."""
    return torch.stack((q, k, v), dim=2).unbind(2)


def _packed_heads(q, k, v):
    """Slices of one tensor [B, L, H, 2*K+V], as EfficientViT packs them."""
    return torch.cat((q, k, v), dim=-1).split((q.shape[-1], k.shape[-1], v.shape[-1]), dim=-1)


def _head_major(q, k, v):
    """Views of [B, H, L, D]."""
    return tuple(in_order(t, (0, 2, 1, 3)) for t in (q, k, v))


def _mixed_orders(q, k, v):
    return in_order(q, (1, 0, 2, 3)), in_order(k, (2, 1, 0, 3)), in_order(v, (2, 0, 1, 3))


def _shared_heads(q, k, v):
    """All heads share q and k (VSSD's single group): head stride 0."""
    return q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k), v


def _expanded_batch(q, k, v):
    return q, k[:1].expand_as(k), v[:1].expand_as(v)


def _sliced_tokens(q, k, v):
    return tuple(sliced(t, 1) for t in (q, k, v))


def _misaligned(q, k, v):
    return misaligned(q), misaligned(k), misaligned(v)


def _positive(q, k, v):
    return q.abs() + 0.1, k.abs() + 0.1, v


def _equal_keys(q, k, v):
    """Every addition to a sum over keys is rounded the same way."""
    return q, k[:, :1].abs().expand_as(k), v


def _zero_rows(q, k, v):
    """ReLU leaves nothing of some queries and keys."""
    q, k = q.clone(), k.clone()
    q[:, ::3], k[:, 1::4], q[..., 1] = -1.0, -2.0, 0.0
    return q, k, v


def _large(q, k, v):
    """The state exceeds float16's range, the output does not."""
    return q.abs() * 8 + 1, k.abs() * 24, v * 150


def _thirteens(q, k, v):
    """Features of exp from e^11 to e^15 exceed float16's range."""
    return 13 + q / 2, 13 + k / 2, v


def _near_largest(q, k, v):
    """elu(x) + 1 up to float16's largest number; its sums are beyond it."""
    return (q.abs() * 2e4).clamp(max=65504.0), (k.abs() * 2e4).clamp(max=65504.0), v * 1000


def _large_scores(q, k, v):
    """phi(q) . phi(k) and the state exceed float16's range, 1 / denominator is below its smallest number."""
    return q.abs() * 100 + 100, k.abs() * 100 + 100, v * 100


def _large_keys(q, k, v):
    """Keys that weights of a thousand take out of float16's range."""
    return q.abs() + 0.1, k.abs() * 100 + 100, v


def _small_features_large_values(q, k, v):
    """Under exp: weights of a thousand take the values out of float16's range, the features take them back."""
    return q, k - 7, v * 400


def _products_with_values(q, k, v):
    """grad_out . v exceeds float16's range, the output and every gradient do not."""
    return q.abs() * 4 + 1, k.abs() * 4 + 1, (v * 25000).clamp(-6e4, 6e4)


def _heads_of_different_size(q, k, v):
    factor = torch.logspace(-3, 1, v.shape[2])[:, None]
    return q * factor.flip(0), k * factor, v * factor


def _threes(q, k, v):
    return q * 3, k * 3, v


def _focused(q, k, v):
    """FLatten's phi(x) = x^3 * |x| / |x^3| of the positive parts."""

    def phi(x):
        x = (x.relu() + 1e-6) / 0.7
        return x**3 * (x.norm(dim=-1, keepdim=True) / (x**3).norm(dim=-1, keepdim=True))

    return phi(q), phi(k), v


def _sample(
    name, B, L, H, K, V=None, *, M=None, den="", weight="", initial=False, lens=None, tags="", layout=None, values=None,
    weight_dtype=None, dtypes=FLOAT_DTYPES, **kwargs,
):  # fmt: skip
    """den: which of "q" and "k" have their own denominator tensor; weight: a layout's name, or nothing."""
    V, M = (K if V is None else V), (L if M is None else M)
    N = B if lens is None else len(lens)

    def make(dtype, device, generator):
        def randn(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float32)

        q, k, v = randn(B, L, H, K), randn(B, M, H, K), randn(B, M, H, V)
        if values is not None:
            q, k, v = values(q, k, v)
        q, k, v = (t.to(device, dtype) for t in (q, k, v))
        if layout is not None:
            q, k, v = layout(q, k, v)
        # Denominators stay away from zero: feature maps but "none" make them positive.
        q_den, k_den = (
            randn(B, n, H, K).abs().to(device, dtype) if c in den else None for c, n in (("q", L), ("k", M))
        )
        if den and layout is not None:
            q_den, k_den = (None if t is None else in_order(t, (0, 2, 1, 3)) for t in (q_den, k_den))
        w = None
        if weight:
            w = torch.rand((B, M, H), generator=generator) + 0.25
            w = _WEIGHTS[weight](w.to(device, weight_dtype or dtype))
        offsets = None
        if lens is not None:
            offsets = torch.tensor([0, *lens]).cumsum(0).to(device, torch.int32)
        state = z = None
        if initial:
            kind = torch.float64 if dtype == torch.float64 else torch.float32
            state, z = randn(N, H, K, V).to(device, kind), (randn(N, H, K).abs() + 0.5).to(device, kind)
        return (q, k, v, q_den, k_den, w, offsets, state, z), dict(kwargs)

    return Sample(name, make, frozenset(tags.split()), dtypes)


_WEIGHTS = {
    "plain": lambda w: w,
    "head_major": lambda w: in_order(w, (0, 2, 1)),
    "per_key": lambda w: w[:, :, :1].expand_as(w),
    "signed": lambda w: w - 0.75,
    "thousands": lambda w: w * 1000,
    "thousandths": lambda w: w / 1000,
    "millionths": lambda w: w / 1e6,
}

# fmt: off
SAMPLES = [
    # Small: every feature at a size that the emulator and the interpreter run too. The first are `framework` as well.
    _sample("small_sum", 2, 7, 2, 8, tags="small framework"),
    _sample("small_everything", 2, 9, 2, 8, 12, den="qk", weight="plain", initial=True, feature_map=ELU1,
            normalize=MEAN, scale=0.5, tags="small framework"),
    _sample("small_causal", 2, 21, 2, 8, 5, causal=True, weight="plain", tags="small framework"),
    _sample("small_quadratic", 2, 6, 2, 16, den="k", weight="plain", quadratic=True, tags="small framework"),
    _sample("small_none", 1, 20, 2, 8, feature_map=NONE, normalize=PLAIN, weight="signed", tags="small"),
    _sample("small_clamp", 2, 13, 1, 12, 20, normalize=CLAMP, clamp_min=40.0, tags="small"),
    _sample("small_exp_mean", 1, 17, 2, 16, 7, M=11, feature_map=EXP, normalize=MEAN, eps=1e-2, tags="small"),
    _sample("small_q_den", 1, 12, 1, 8, den="q", feature_map=NONE, values=_positive, layout=_head_major, tags="small"),
    _sample("small_k_den", 1, 12, 1, 8, M=9, den="k", feature_map=ELU1, weight="head_major", tags="small"),
    _sample("small_packed", 1, 70, 1, 16, layout=_packed, eps=1e-15, tags="small"),
    _sample("small_packed_heads", 1, 33, 2, 16, layout=_packed_heads, tags="small"),
    _sample("small_shared_heads", 1, 19, 3, 8, 16, layout=_shared_heads, normalize=PLAIN, feature_map=NONE,
            weight="plain", tags="small"),
    _sample("small_misaligned", 1, 18, 2, 20, 12, layout=_misaligned, weight="per_key", tags="small"),
    _sample("small_tails", 1, 37, 1, 33, 17, tags="small"),
    _sample("small_odd", 1, 5, 2, 3, 1, tags="small"),
    _sample("small_wide", 1, 10, 1, 72, 40, feature_map=ELU1, tags="small"),
    _sample("small_causal_chunks", 1, 70, 1, 16, 20, causal=True, den="qk", weight="plain", feature_map=ELU1,
            normalize=MEAN, eps=1e-3, initial=True, tags="small"),
    _sample("small_causal_none", 1, 67, 1, 8, feature_map=NONE, normalize=PLAIN, causal=True, weight="signed",
            tags="small"),
    _sample("small_causal_clamp", 1, 40, 1, 8, normalize=CLAMP, clamp_min=30.0, causal=True, tags="small"),
    _sample("small_causal_wide", 1, 66, 1, 36, 40, causal=True, layout=_packed_heads, tags="small"),
    _sample("small_segments", 1, 41, 2, 8, lens=(17, 0, 1, 23), tags="small"),
    _sample("small_segments_everything", 1, 30, 1, 16, 12, lens=(0, 13, 17, 0), den="qk", weight="plain", initial=True,
            feature_map=ELU1, normalize=MEAN, tags="small"),
    _sample("small_segments_causal", 1, 70, 1, 8, lens=(3, 66, 0, 1), causal=True, initial=True, normalize=MEAN,
            tags="small"),
    # Long enough to be cut into pieces everywhere.
    _sample("small_splits", 1, 300, 1, 8, 12, M=260, den="k", weight="plain", initial=True, tags="small"),
    _sample("small_splits_causal", 1, 300, 1, 8, causal=True, den="qk", initial=True, normalize=MEAN, tags="small"),
    _sample("small_splits_segments", 1, 350, 1, 8, lens=(200, 0, 10, 140), causal=True, weight="plain", tags="small"),
    # Sums over many keys: added up one by one they would be far less accurate than PyTorch's.
    _sample("small_equal_keys", 1, 4, 1, 8, M=12544, values=_equal_keys, tags="small", dtypes=(torch.float32,)),
    _sample("small_equal_keys_causal", 1, 1500, 1, 8, causal=True, values=_equal_keys, tags="small",
            dtypes=(torch.float32,)),
    _sample("small_equal_keys_quadratic", 1, 4, 1, 8, M=12544, values=_equal_keys, quadratic=True, tags="small",
            dtypes=(torch.float32,)),
    _sample("equal_keys_whole", 64, 2, 1, 8, 1, M=12544, values=_equal_keys, tags="nasty", dtypes=(torch.float32,)),
    _sample("equal_keys_causal", 8, 12544, 1, 16, 8, causal=True, values=_equal_keys, tags="nasty",
            dtypes=(torch.float32,)),
    _sample("small_initial_clamp", 2, 11, 1, 8, normalize=CLAMP, clamp_min=20.0, initial=True, tags="small"),
    _sample("small_quadratic_everything", 1, 9, 2, 20, 12, M=14, den="qk", weight="plain", feature_map=EXP,
            normalize=MEAN, quadratic=True, tags="small"),
    _sample("small_quadratic_none", 1, 13, 1, 16, M=5, feature_map=NONE, normalize=PLAIN, weight="signed",
            quadratic=True, tags="small"),
    _sample("small_quadratic_clamp", 1, 8, 2, 8, normalize=CLAMP, clamp_min=20.0, quadratic=True, layout=_packed,
            tags="small"),
    _sample("small_quadratic_causal", 1, 35, 1, 40, causal=True, normalize=MEAN, eps=1e-3, quadratic=True,
            tags="small"),
    _sample("small_quadratic_chunks", 1, 70, 1, 16, 20, den="q", quadratic=True, tags="small"),
    _sample("small_zero_rows", 1, 12, 1, 8, eps=1e-15, values=_zero_rows, tags="small nasty"),
    _sample("small_zero_rows_quadratic", 1, 12, 1, 8, eps=1e-15, values=_zero_rows, quadratic=True,
            tags="small nasty"),
    _sample("small_state_only", 1, 0, 2, 8, M=15, tags="small"),
    _sample("small_output_only", 1, 15, 2, 8, M=0, initial=True, normalize=MEAN, tags="small"),
    _sample("small_no_keys", 1, 3, 1, 8, M=0, tags="small empty"),
    # Intermediate values beyond float16's range; outputs and gradients are within. Weights keep the gradients of the
    # returned states there.
    _sample("small_float16_exp", 1, 22, 2, 8, weight="millionths", weight_dtype=torch.float32, feature_map=EXP,
            values=_thirteens, tags="small nasty", dtypes=FLOAT16_FIRST),
    _sample("small_float16_exp_causal", 1, 37, 1, 8, weight="millionths", weight_dtype=torch.float32, feature_map=EXP,
            values=_thirteens, causal=True, tags="small nasty", dtypes=FLOAT16_FIRST),
    _sample("small_float16_exp_quadratic", 1, 22, 2, 8, M=19, feature_map=EXP, values=_thirteens, quadratic=True,
            tags="small nasty", dtypes=FLOAT16_FIRST),
    _sample("small_float16_elu1", 1, 22, 2, 8, weight="thousandths", weight_dtype=torch.float32, feature_map=ELU1,
            normalize=MEAN, values=_near_largest, tags="small nasty", dtypes=FLOAT16_FIRST),
    _sample("small_float16_scores", 1, 24, 2, 72, 40, values=_large_scores, tags="small nasty", dtypes=FLOAT16_FIRST),
    _sample("small_float16_scores_causal", 1, 38, 1, 16, 12, values=_large_scores, causal=True, tags="small nasty",
            dtypes=FLOAT16_FIRST),
    _sample("small_float16_scores_quadratic", 1, 24, 2, 16, 12, values=_large_scores, quadratic=True,
            tags="small nasty", dtypes=FLOAT16_FIRST),
    _sample("small_float16_weighted_keys", 1, 21, 2, 8, weight="thousands", values=_large_keys, quadratic=True,
            tags="small nasty", dtypes=FLOAT16_FIRST),
    _sample("small_float16_weighted_values", 1, 21, 2, 8, 12, weight="thousands", feature_map=EXP,
            values=_small_features_large_values, tags="small nasty", dtypes=FLOAT16_FIRST),
    _sample("small_float16_weighted_values_causal", 1, 35, 1, 8, 12, weight="thousands", feature_map=EXP,
            values=_small_features_large_values, causal=True, tags="small nasty", dtypes=FLOAT16_FIRST),
    _sample("small_float16_values", 1, 23, 1, 8, 40, values=_products_with_values, quadratic=True, tags="small nasty",
            dtypes=FLOAT16_FIRST),
    # Tiny: gradcheck of the definition.
    _sample("tiny_relu_sum", 1, 3, 1, 2, M=2, den="q", tags="tiny"),
    _sample("tiny_elu1_mean", 2, 2, 1, 2, 1, feature_map=ELU1, normalize=MEAN, eps=0.1, weight="plain", initial=True,
            tags="tiny"),
    _sample("tiny_exp_clamp", 1, 4, 1, 2, feature_map=EXP, normalize=CLAMP, clamp_min=4.0, den="k", tags="tiny"),
    _sample("tiny_none", 1, 3, 2, 2, 1, feature_map=NONE, normalize=PLAIN, weight="plain", initial=True, tags="tiny"),
    _sample("tiny_causal", 1, 4, 1, 2, causal=True, normalize=MEAN, feature_map=ELU1, den="qk", weight="plain",
            initial=True, tags="tiny"),
    _sample("tiny_segments", 1, 4, 1, 2, lens=(1, 0, 3), feature_map=ELU1, initial=True, tags="tiny"),
    _sample("tiny_quadratic", 1, 3, 1, 2, 1, M=2, quadratic=True, feature_map=ELU1, den="qk", weight="plain",
            tags="tiny"),
    # Real networks; fewer heads than they have.
    _sample("efficientvit_b1_stage3", 2, 196, 4, 16, eps=1e-15, layout=_packed_heads, tags="vit"),
    _sample("efficientvit_b1_stage4", 2, 49, 8, 16, eps=1e-15, layout=_packed_heads, tags="vit"),
    _sample("efficientvit_b3_stage4", 1, 49, 4, 32, eps=1e-15, layout=_packed_heads, quadratic=True, tags="vit"),
    _sample("efficientvit_l2_stage3", 1, 784, 2, 32, eps=1e-15, layout=_packed_heads, tags="vit"),
    _sample("sana_1024px", 1, 1024, 2, 32, eps=1e-15, layout=_packed, tags="vit"),
    _sample("sana_112", 1, 196, 2, 112, eps=1e-15, layout=_packed, tags="vit"),
    _sample("mlla_t_stage1", 1, 3136, 2, 32, feature_map=NONE, normalize=MEAN, den="qk", tags="vit"),
    _sample("mlla_t_stage3", 2, 196, 3, 32, feature_map=NONE, normalize=MEAN, den="qk", tags="vit"),
    _sample("slab_deit_t", 2, 197, 3, 64, layout=_packed, tags="vit"),
    _sample("slab_swin_window", 16, 49, 3, 32, layout=_packed, quadratic=True, tags="vit"),
    _sample("flatten_pvt_stage1", 1, 3136, 1, 64, M=49, feature_map=NONE, values=_focused, tags="vit"),
    _sample("flatten_swin", 2, 49, 3, 32, feature_map=NONE, values=_focused, tags="vit"),
    _sample("l2vit_global", 2, 196, 3, 32, normalize=CLAMP, clamp_min=100.0, scale=1.3, layout=_head_major, tags="vit"),
    _sample("l2vit_global_clamped", 1, 49, 3, 32, normalize=CLAMP, clamp_min=250.0, tags="vit"),
    _sample("vssd_t_stage2", 1, 784, 4, 64, 32, feature_map=NONE, normalize=PLAIN, weight="plain",
            weight_dtype=torch.float32, layout=_shared_heads, tags="vit"),
    _sample("dualtoken_map", 2, 196, 2, 32, M=49, tags="vit"),
    _sample("dualtoken_tokens", 2, 49, 2, 32, M=784, tags="vit"),
    _sample("hit_sr_correlation", 2, 256, 3, 20, 36, feature_map=NONE, normalize=PLAIN, scale=1 / 256, tags="vit"),
    _sample("segments_of_images", 1, 1029, 2, 32, lens=(196, 49, 784), tags="vit"),
    # Sizes.
    _sample("d8", 2, 196, 3, 8, tags="nasty"),
    _sample("d64_L784", 1, 784, 2, 64, feature_map=ELU1, tags="nasty"),
    _sample("d128", 1, 100, 2, 128, tags="nasty"),
    _sample("d256", 1, 50, 1, 256, tags="nasty"),
    _sample("d256_causal", 1, 70, 1, 256, causal=True, tags="nasty"),
    _sample("d256_quadratic", 2, 49, 1, 256, 200, quadratic=True, tags="nasty"),
    _sample("k20_v36", 1, 150, 2, 20, 36, den="qk", weight="plain", tags="nasty"),
    _sample("k100_v20", 1, 150, 2, 100, 20, feature_map=EXP, values=lambda q, k, v: (q / 4, k / 4, v), tags="nasty"),
    _sample("k1_v256", 1, 33, 2, 1, 256, tags="nasty"),
    _sample("k256_v1", 1, 33, 2, 256, 1, feature_map=ELU1, tags="nasty"),
    _sample("k1_v1", 3, 65, 2, 1, tags="nasty"),
    _sample("one_token", 3, 1, 2, 32, tags="nasty"),
    _sample("one_key", 1, 130, 2, 32, M=1, feature_map=ELU1, tags="nasty"),
    _sample("one_query", 1, 1, 2, 32, M=3000, tags="nasty"),
    _sample("one_token_causal", 2, 1, 3, 24, causal=True, initial=True, tags="nasty"),
    _sample("many_splits", 1, 5000, 1, 16, 8, weight="plain", initial=True, tags="nasty"),
    _sample("many_heads", 1, 65, 40, 8, tags="nasty"),
    # Values.
    _sample("zero_rows", 1, 200, 2, 32, eps=1e-15, values=_zero_rows, tags="nasty"),
    _sample("zero_rows_causal", 1, 130, 2, 32, eps=1e-15, values=_zero_rows, causal=True, initial=True, tags="nasty"),
    _sample("large_values", 1, 784, 2, 32, values=_large, tags="nasty"),
    _sample("large_values_mean", 1, 784, 2, 32, values=_large, normalize=MEAN, den="qk", tags="nasty"),
    _sample("large_values_causal", 1, 200, 1, 32, values=_large, causal=True, tags="nasty"),
    _sample("large_values_quadratic", 2, 49, 2, 64, values=_large, quadratic=True, tags="nasty"),
    _sample("heads_of_different_size", 1, 70, 4, 16, values=_heads_of_different_size, tags="nasty"),
    _sample("exp_of_threes", 1, 100, 2, 16, feature_map=EXP, values=_threes, tags="nasty"),
    _sample("elu1_of_threes_causal", 1, 150, 2, 16, feature_map=ELU1, values=_threes, causal=True, tags="nasty"),
    _sample("negative_scale", 1, 50, 2, 16, scale=-0.7, tags="nasty"),
    _sample("zero_scale", 1, 50, 2, 16, scale=0.0, tags="nasty"),
    # Wide tokens in several chunks: CPU kernels fetch the next chunk ahead, up to six tensors of it.
    _sample("fetched_ahead", 4, 70, 1, 256, weight="plain", tags="nasty"),
    _sample("fetched_ahead_causal", 4, 70, 1, 256, causal=True, den="qk", feature_map=ELU1, normalize=MEAN,
            tags="nasty"),
    _sample("fetched_ahead_head_major", 32, 70, 2, 64, layout=_head_major, tags="nasty"),
    _sample("negative_eps", 1, 50, 2, 16, eps=-0.5, feature_map=ELU1, tags="nasty"),
    _sample("mean_large_eps_causal", 1, 200, 2, 16, normalize=MEAN, eps=0.5, causal=True, tags="nasty"),
    _sample("clamp_nothing", 1, 60, 2, 16, normalize=CLAMP, clamp_min=-5.0, feature_map=ELU1, tags="nasty"),
    _sample("clamp_causal_initial", 1, 150, 2, 16, normalize=CLAMP, clamp_min=200.0, causal=True, initial=True,
            tags="nasty"),
    # Strides.
    _sample("mixed_orders", 2, 40, 3, 20, layout=_mixed_orders, den="qk", weight="head_major", tags="strided"),
    _sample("expanded_batch", 3, 40, 2, 16, layout=_expanded_batch, tags="strided"),
    _sample("sliced_tokens", 2, 60, 2, 24, 16, layout=_sliced_tokens, tags="strided"),
    _sample("misaligned_causal", 1, 130, 2, 32, layout=_misaligned, causal=True, tags="strided"),
    _sample("misaligned_quadratic", 1, 45, 2, 48, layout=_misaligned, quadratic=True, tags="strided"),
    _sample("shared_heads_causal", 2, 80, 3, 16, 24, layout=_shared_heads, causal=True, tags="strided"),
    _sample("head_major_segments", 1, 130, 2, 16, layout=_head_major, lens=(64, 1, 65), den="qk", tags="strided"),
    _sample("weight_bfloat16", 2, 30, 2, 16, weight="per_key", weight_dtype=torch.bfloat16, tags="strided"),
    _sample("weight_float32", 2, 30, 2, 16, weight="head_major", weight_dtype=torch.float32, causal=True,
            tags="strided"),
    _sample("weight_float16", 2, 30, 2, 16, weight="plain", weight_dtype=torch.float16, quadratic=True,
            tags="strided"),
    # Nothing to do, or nearly.
    _sample("empty_batch", 0, 8, 2, 8, den="qk", weight="plain", initial=True, tags="empty"),
    _sample("empty_heads", 2, 8, 0, 8, causal=True, tags="empty"),
    _sample("empty_tokens", 2, 0, 2, 8, weight="plain", tags="empty"),
    _sample("empty_tokens_causal", 2, 0, 2, 8, causal=True, initial=True, tags="empty"),
    _sample("empty_quadratic", 2, 0, 2, 8, quadratic=True, tags="empty"),
    _sample("empty_keys_quadratic", 2, 5, 2, 8, M=0, quadratic=True, tags="empty"),
    _sample("empty_keys_none", 2, 5, 2, 8, M=0, normalize=PLAIN, tags="empty"),
    _sample("empty_segments", 1, 0, 2, 8, lens=(0, 0), initial=True, tags="empty"),
    _sample("no_segments", 1, 0, 2, 8, lens=(), tags="empty"),
    _sample("state_only_everything", 2, 0, 2, 24, 20, M=300, den="qk", weight="plain", initial=True, feature_map=ELU1,
            tags="nasty"),
    _sample("output_only", 2, 300, 2, 24, 20, M=0, initial=True, den="q", tags="nasty"),
    # More sequences and heads than a CUDA grid's y dimension, and many tokens.
    _sample("huge_batch", 70001, 2, 1, 2, tags="huge", dtypes=(torch.float32,)),
    _sample("huge_heads", 1, 2, 66000, 2, quadratic=True, tags="huge", dtypes=(torch.float32,)),
    _sample("huge_length", 1, 140000, 1, 4, tags="huge", dtypes=(torch.float32,)),
    # Outputs of 16 MiB are written past the caches.
    _sample("huge_output", 8, 2048, 4, 64, tags="huge", dtypes=(torch.float32,)),
    _sample("huge_output_bfloat16", 4, 4096, 8, 64, tags="huge", dtypes=(torch.bfloat16,)),
]
# fmt: on


def random_sample(name, choose):
    """Any options at once, at a small size; `choose` is a random.Random."""
    normalize = choose.choice((PLAIN, SUM, MEAN, CLAMP))
    form = choose.choice(("", "", "causal", "segments", "segments causal", "quadratic", "quadratic causal"))
    causal, quadratic = "causal" in form, "quadratic" in form
    L = choose.choice((1, 2, 7, 16, 31, 33, 63, 65, 70, 130, 150))
    lens = None
    if "segments" in form:
        cuts = sorted(choose.randint(0, L) for _ in range(choose.randint(0, 4)))
        lens = tuple(b - a for a, b in zip([0, *cuts], [*cuts, L], strict=True))
    free = not causal and lens is None
    K, V = (choose.choice((1, 3, 8, 16, 17, 32, 40, 64, 72)) for _ in range(2))
    return _sample(
        name, 1 if lens else choose.randint(1, 2), L, choose.randint(1, 3), K, V,
        M=choose.choice((1, 5, 32, 67, L)) if free else L, lens=lens,
        den="" if normalize == PLAIN else choose.choice(("", "", "q", "k", "qk")),
        weight=choose.choice(("", "", "plain", "head_major", "per_key")),
        initial=not quadratic and choose.random() < 0.3,
        feature_map=choose.choice((RELU, ELU1, EXP)), normalize=normalize, eps=1e-3, clamp_min=5.0,
        scale=choose.choice((1.0, -0.7)), causal=causal, quadratic=quadratic,
        layout=choose.choice((None, _head_major, _misaligned, *(() if free else (_packed_heads,)))),
        values=_positive,
    )  # fmt: skip


# ---- error magnitudes ------------------------------------------------------------------------------------------------


def magnitudes(args, kwargs, output_grads, eps):
    """Sums of the absolute values of the terms behind every component of the outputs and gradients, in float64.

    Numerator, denominator, state and z are sums of products, so the definition itself, applied to absolute values
    without feature map and normaliser, is the sum of absolute terms, and its derivative that of the gradients'.
    """
    q, k, v, q_den, k_den, weight, cu_seqlens, state, z = (*args, *(None,) * (9 - len(args)))
    feature_map, normalize = kwargs.get("feature_map", RELU), kwargs.get("normalize", SUM)
    phi = PHI[FEATURE_MAPS[feature_map]]
    options = {"feature_map": "none", "normalize": "none", "causal": kwargs.get("causal", False)}
    scale = abs(kwargs.get("scale", 1.0))

    def feature(x):
        """phi(x) and its derivative."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = phi(x)
            return y.detach(), torch.autograd.grad(y.sum(), x)[0].abs()

    fq, fk = feature(q), feature(k)
    fq_den, fk_den = (fq if q_den is None else feature(q_den)), (fk if k_den is None else feature(k_den))
    ones = torch.ones_like(v[..., :1])

    def denominator_sum(a, b, w, z):  # phi(q_den) . z as the numerator of values 1
        start = (None, None) if z is None else (z[..., None], z)
        total, _, z_sum = definition(a, b, ones, None, None, w, cu_seqlens, *start, **options)
        return total[..., 0], z_sum

    with torch.no_grad():
        true_sum, _ = denominator_sum(fq_den[0], fk_den[0], weight, z)
        keys, _ = denominator_sum(torch.ones_like(q[..., :1]), torch.ones_like(k[..., :1]), None, None)
        passes = torch.ones_like(true_sum)
        if normalize == PLAIN:
            d = torch.ones_like(true_sum)
        elif normalize == CLAMP:
            low = kwargs.get("clamp_min", 0.0)
            d, passes = true_sum.clamp(min=low), (true_sum >= low).double()
        else:
            d = true_sum + kwargs.get("eps", 1e-6) * (keys if normalize == MEAN else 1.0)
        d = d.abs()

    with torch.enable_grad():
        leaves = {
            "q": fq[0], "k": fk[0], "v": v, "q_den": fq_den[0], "k_den": fk_den[0], "weight": weight, "state": state,
            "z": z,
        }  # fmt: skip
        leaves = {n: None if t is None else t.detach().abs().requires_grad_() for n, t in leaves.items()}
        a = leaves
        numerator, state_size, _ = definition(
            a["q"], a["k"], a["v"], None, None, a["weight"], cu_seqlens, a["state"], a["z"], **options
        )
        den_size, z_size = denominator_sum(a["q_den"], a["k_den"], a["weight"], a["z"])
    certainty = 1.0 + (passes * den_size.detach() / d if normalize != PLAIN else 0.0)  # of the denominator
    factor = (certainty / d)[..., None]
    out_size = scale * numerator.detach() * factor
    state_out, z_out = state_size.detach(), z_size.detach()
    quadratic = kwargs.get("quadratic", False)
    if quadratic:
        state_out, z_out = state_out[:, :, :0, :0], z_out[:, :, :0]
    outputs = {"out": out_size, "state": state_out, "z": z_out}
    if output_grads is None:
        return outputs, {}

    do, ds, dz = (None if g is None else g.abs() for g in output_grads)
    if quadratic:
        ds = dz = None
    do = torch.zeros_like(out_size) if do is None else do
    u = scale * do * factor
    r = (do * out_size).sum(-1) * certainty / d * passes if normalize != PLAIN else torch.zeros_like(d)
    pairs = [(numerator, u), (den_size, r), (state_size, ds), (z_size, dz)]
    pairs = [(y, g) for y, g in pairs if g is not None]
    given = {n: t for n, t in leaves.items() if t is not None}
    found = torch.autograd.grad([y for y, _ in pairs], list(given.values()), [g for _, g in pairs], allow_unused=True)
    sizes = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(given.items(), found, strict=True)}
    gradients = {"v": sizes["v"]}
    for side, own, f, f_den in (("q", q_den, fq, fq_den), ("k", k_den, fk, fk_den)):
        gradients[side], through_den = f[1] * sizes[side], f_den[1] * sizes[f"{side}_den"]
        if own is None:
            gradients[side] = gradients[side] + through_den
        else:
            gradients[f"{side}_den"] = through_den
    if weight is not None:
        gradients["weight"] = sizes["weight"]
    if state is not None:
        gradients |= {"initial_state": sizes["state"], "initial_z": sizes["z"]}
    return outputs, gradients


# ---- the backward op ------------------------------------------------------------------------------------------------


def resize(args, kwargs):
    """The same call with more batches and tokens; with cu_seqlens longer segments."""
    args = (*args, *(None,) * (9 - len(args)))
    offsets = args[6]

    def grow(t, tokens):
        if t is None:
            return None
        if offsets is None:
            t = torch.cat((t, t.flip(0)), 0)[: t.shape[0] + 1]
        return torch.cat((t, t, t.flip(1)), 1)[:, : 2 * t.shape[1] + 3].contiguous() if tokens else t.contiguous()

    tokens, states = [grow(t, True) for t in args[:6]], [grow(t, False) for t in args[7:]]
    if offsets is not None:
        offsets = (2 * offsets).clone()
        offsets[-1] = tokens[0].shape[1]
    return (*tokens, offsets, *states), kwargs


def memory_calls(dtype):
    """Large calls whose states and split states are small beside the tokens."""
    generator = torch.Generator("cpu").manual_seed(0)

    def call(B, L, H, D, **kwargs):
        q, k, v = torch.randn(B, L, 3, H, D, generator=generator).to(dtype).unbind(2)
        return (q, k, v, *(None,) * 6), kwargs

    return [
        ("L12544_h6_d32", *call(2, 12544, 6, 32)),
        ("L12544_h3_d64_elu1_mean", *call(2, 12544, 3, 64, feature_map=ELU1, normalize=MEAN)),
        ("L6272_h6_d32_causal", *call(2, 6272, 6, 32, causal=True)),
        ("B256_L49_h6_d64_quadratic", *call(256, 49, 6, 64, quadratic=True)),
    ]


# ---- bad inputs -----------------------------------------------------------------------------------------------------


def good_call():
    """A call that works; every bad input is this one with something changed."""
    generator = torch.Generator("cpu").manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "q": randn(1, 6, 2, 8), "k": randn(1, 6, 2, 8), "v": randn(1, 6, 2, 5), "q_den": randn(1, 6, 2, 8).abs(),
        "k_den": randn(1, 6, 2, 8).abs(), "weight": randn(1, 6, 2).abs(), "cu_seqlens": None, "initial_state": None,
        "initial_z": None,
    }  # fmt: skip


BACKWARD_TENSORS = OPS[f"{NAME}_backward"].names


def _good_backward():
    return good_call() | {
        "grad_out": torch.zeros(1, 6, 2, 5), "grad_state": _STATE, "grad_z": _Z, "state": _STATE, "z": _Z,
    }  # fmt: skip


def _bad(name, error, match, *, schema_match=None, torch_ops=True, public=True, **changes):
    """changes: argument -> new value, or a function of the old one."""

    def make():
        return split_call(changed(good_call(), changes), TENSORS)

    return BadInput(name, make, error, match, schema_match, torch_ops, public)


def _bad_backward(name, error, match, *, schema_match=None, **changes):
    def make():
        return split_call(changed(_good_backward(), changes), BACKWARD_TENSORS)

    return BadInput(name, make, error, match, schema_match, public=False, op="linear_attention_backward")


def _offsets(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


_ON_CPU = "must be on (cpu like q|the device of q), got .*(meta|device)"
_STATE = torch.zeros(1, 2, 8, 5)
_Z = torch.zeros(1, 2, 8)
_OTHERS = ("k", "v", "q_den", "k_den")

# fmt: off
BAD_INPUTS = [
    # q
    _bad("q_none", TypeError, f"q {IS_TENSOR}NoneType", schema_match=r"q must be .*got \[0\]", q=None),
    _bad("q_list", TypeError, f"q {IS_TENSOR}list", schema_match="argument 'q'", q=lambda t: t.tolist()),
    _bad("q_rank_3", ValueError, r"q must be \[B, L, H, K\], got \[6, 2, 8\]", q=lambda t: t[0]),
    _bad("q_rank_5", ValueError, r"q must be \[B, L, H, K\], got \[1, 1, 6, 2, 8\]", q=lambda t: t[None]),
    _bad("q_float64", TypeError, f"q {IS_FLOAT}.*(float64|Double)",
         **dict.fromkeys(("q", *_OTHERS), to(torch.float64))),
    _bad("q_int32", TypeError, f"q {IS_FLOAT}.*(int32|Int)", **dict.fromkeys(("q", *_OTHERS), to(torch.int32))),
    _bad("q_complex64", TypeError, f"q {IS_FLOAT}.*(complex64|ComplexFloat)",
         **dict.fromkeys(("q", *_OTHERS), to(torch.complex64))),
    _bad("q_sparse", TypeError, r"q must be (a )?dense.*got .*[sS]parse", q=lambda t: t.to_sparse()),
    _bad("q_head_dim_0", ValueError, r"q must have a head dim between 1 and 256, got \[1, 6, 2, 0\]",
         **dict.fromkeys(("q", "k", "q_den", "k_den"), lambda t: t[..., :0])),
    _bad("q_head_dim_257", ValueError, r"q must have a head dim between 1 and 256, got \[1, 6, 2, 257\]",
         q_den=None, k_den=None, **dict.fromkeys("qk", lambda t: torch.zeros(1, 6, 2, 257))),
    _bad("q_last_stride_2", ValueError, "q must .*last stride.*1.*got", q=every_other),
    # k
    _bad("k_none", TypeError, f"k {IS_TENSOR}NoneType", schema_match=r"k must be .*got \[0\]", k=None),
    _bad("k_head_dim", ValueError, r"k must be \[B, M, H, K\] like q \[1, 6, 2, 8\], got \[1, 6, 2, 7\]",
         k=lambda t: t[..., :7]),
    _bad("k_heads", ValueError, r"k must be \[B, M, H, K\] like q .*got \[1, 6, 1, 8\]", k=lambda t: t[:, :, :1]),
    _bad("k_batch", ValueError, r"k must be \[B, M, H, K\] like q .*got \[2, ", k=lambda t: torch.cat((t, t))),
    _bad("k_rank", ValueError, r"k must be \[B, M, H, K\].*got \[1, 6, 16\]", k=lambda t: t.flatten(2)),
    _bad("k_dtype", TypeError, r"k must be .*[fF]loat.*like q.*got .*(bfloat16|BFloat16)", k=to(torch.bfloat16)),
    _bad("k_meta", ValueError, f"k {_ON_CPU}", k=to("meta")),
    _bad("k_last_stride_2", ValueError, "k must .*last stride.*1.*got", k=every_other),
    _bad("k_length_causal", ValueError, "k must be as long as q when causal is True, 6, got 5", causal=True,
         **dict.fromkeys(("k", "v", "k_den", "weight"), lambda t: t[:, :5])),
    # v
    _bad("v_string", TypeError, f"v {IS_TENSOR}str", schema_match="argument 'v'", v="v"),
    _bad("v_length", ValueError, r"v must be \[B, M, H, V\] like k \[1, 6, 2, 8\], got \[1, 5, 2, 5\]",
         v=lambda t: t[:, :5]),
    _bad("v_rank", ValueError, r"v must be \[B, M, H, V\].*got \[1, 6, 2\]", v=lambda t: t[..., 0]),
    _bad("v_dtype", TypeError, r"v must be .*[fF]loat.*like q.*got .*(float16|Half)", v=to(torch.float16)),
    _bad("v_meta", ValueError, f"v {_ON_CPU}", v=to("meta")),
    _bad("v_last_stride_2", ValueError, "v must .*last stride.*1.*got", v=every_other),
    _bad("v_head_dim_0", ValueError, r"v must have a head dim between 1 and 256, got \[1, 6, 2, 0\]",
         v=lambda t: t[..., :0]),
    _bad("v_head_dim_300", ValueError, r"v must have a head dim between 1 and 256, got \[1, 6, 2, 300\]",
         v=torch.zeros(1, 6, 2, 300)),
    # q_den, k_den
    _bad("q_den_tuple", TypeError, f"q_den {IS_TENSOR}tuple", schema_match="argument 'q_den'", q_den=(0.0,)),
    _bad("q_den_shape", ValueError, r"q_den must be \[B, L, H, K\] = \[1, 6, 2, 8\], got \[1, 6, 2, 1\]",
         q_den=lambda t: t[..., :1]),
    _bad("q_den_dtype", TypeError, r"q_den must be .*[fF]loat.*got .*(float16|Half)", q_den=to(torch.float16)),
    _bad("q_den_meta", ValueError, f"q_den {_ON_CPU}", q_den=to("meta")),
    _bad("q_den_last_stride", ValueError, "q_den must .*last stride.*1.*got", q_den=every_other),
    _bad("q_den_without_normalizer", ValueError, r"q_den must be None when normalize is none, got \[1, 6, 2, 8\]",
         torch_ops=False, normalize="none"),
    _bad("q_den_without_normalizer_int", ValueError, r"q_den must be None when normalize is none, got \[1, 6, 2, 8\]",
         public=False, normalize=PLAIN),
    _bad("k_den_shape", ValueError, r"k_den must be \[B, M, H, K\] = \[1, 6, 2, 8\], got \[1, 5, 2, 8\]",
         k_den=lambda t: t[:, :5]),
    _bad("k_den_dtype", TypeError, r"k_den must be .*[fF]loat.*got .*(bfloat16|BFloat16)", k_den=to(torch.bfloat16)),
    _bad("k_den_meta", ValueError, f"k_den {_ON_CPU}", k_den=to("meta")),
    _bad("k_den_last_stride", ValueError, "k_den must .*last stride.*1.*got", k_den=every_other),
    _bad("k_den_without_normalizer", ValueError, r"k_den must be None when normalize is none, got \[1, 6, 2, 8\]",
         public=False, q_den=None, normalize=PLAIN),
    # weight
    _bad("weight_float", TypeError, f"weight {IS_TENSOR}float", schema_match="weight", weight=1.0),
    _bad("weight_shape", ValueError, r"weight must be \[B, M, H\] = \[1, 6, 2\], got \[1, 6\]",
         weight=lambda t: t[..., 0]),
    _bad("weight_head_major", ValueError, r"weight must be \[B, M, H\] = \[1, 6, 2\], got \[1, 2, 6\]",
         weight=lambda t: t.mT),
    _bad("weight_float64", TypeError, f"weight {IS_FLOAT}.*(float64|Double)", weight=to(torch.float64)),
    _bad("weight_int", TypeError, f"weight {IS_FLOAT}.*(int64|Long)", weight=to(torch.int64)),
    _bad("weight_meta", ValueError, f"weight {_ON_CPU}", weight=to("meta")),
    # cu_seqlens
    _bad("cu_seqlens_list", TypeError, f"cu_seqlens {IS_TENSOR}list", schema_match="argument 'cu_seqlens'",
         cu_seqlens=[0, 6]),
    _bad("cu_seqlens_float", TypeError, r"cu_seqlens must be (torch\.)?(int32|Int), got .*(float32|Float)",
         cu_seqlens=torch.tensor([0.0, 6.0])),
    _bad("cu_seqlens_int64", TypeError, r"cu_seqlens must be (torch\.)?(int32|Int), got .*(int64|Long)", public=False,
         cu_seqlens=_offsets(0, 6, dtype=torch.int64)),
    _bad("cu_seqlens_rank", ValueError, r"cu_seqlens must be \[N \+ 1\], got \[1, 2\]",
         cu_seqlens=_offsets(0, 6)[None]),
    _bad("cu_seqlens_empty", ValueError, r"cu_seqlens must be \[N \+ 1\], got \[0\]", cu_seqlens=_offsets()),
    _bad("cu_seqlens_first", ValueError, r"cu_seqlens must rise from 0 to the length of q, 6, got \[1, 6\]",
         cu_seqlens=_offsets(1, 6)),
    _bad("cu_seqlens_last", ValueError, r"cu_seqlens must rise from 0 to the length of q, 6, got \[0, 7\]",
         cu_seqlens=_offsets(0, 7)),
    _bad("cu_seqlens_short", ValueError, r"cu_seqlens must rise from 0 to the length of q, 6, got \[0, 2, 5\]",
         cu_seqlens=_offsets(0, 2, 5)),
    _bad("cu_seqlens_falling", ValueError, r"cu_seqlens must rise from 0 .*got \[0, 4, 2, 6\]",
         cu_seqlens=_offsets(0, 4, 2, 6)),
    _bad("cu_seqlens_negative", ValueError, r"cu_seqlens must rise from 0 .*got \[0, -1, 6\]",
         cu_seqlens=_offsets(0, -1, 6)),
    _bad("cu_seqlens_beyond_int32", ValueError, r"cu_seqlens must rise from 0 .*got \[0, 4294967296, 6\]",
         torch_ops=False, cu_seqlens=_offsets(0, 1 << 32, 6, dtype=torch.int64)),
    _bad("cu_seqlens_batch", ValueError, r"q must have a batch size of 1 when cu_seqlens is given, got \[2, 6, 2, 8\]",
         cu_seqlens=_offsets(0, 6),
         **dict.fromkeys(("q", *_OTHERS, "weight"), lambda t: torch.cat((t, t)))),
    _bad("cu_seqlens_lengths", ValueError, "k must be as long as q when cu_seqlens is given, 6, got 5",
         cu_seqlens=_offsets(0, 6), **dict.fromkeys(("k", "v", "k_den", "weight"), lambda t: t[:, :5])),
    _bad("cu_seqlens_quadratic", ValueError, r"cu_seqlens must be None when quadratic is True, got \[2\]", public=False,
         cu_seqlens=_offsets(0, 6), quadratic=True),
    _bad("cu_seqlens_meta", ValueError, f"cu_seqlens {_ON_CPU}", cu_seqlens=_offsets(0, 6).to("meta")),
    # initial_state, initial_z
    _bad("initial_state_alone", ValueError, "initial_z must be given together with initial_state, got None",
         initial_state=_STATE),
    _bad("initial_z_alone", ValueError, "initial_state must be given together with initial_z, got None", initial_z=_Z),
    _bad("initial_state_shape", ValueError,
         r"initial_state must be \[N, H, K, V\] = \[1, 2, 8, 5\], got \[1, 2, 5, 8\]",
         initial_state=_STATE.mT, initial_z=_Z),
    _bad("initial_state_segments", ValueError,
         r"initial_state must be \[N, H, K, V\] = \[2, 2, 8, 5\], got \[1, 2, 8, 5\]",
         cu_seqlens=_offsets(0, 2, 6), initial_state=_STATE, initial_z=_Z),
    _bad("initial_state_dtype", TypeError, f"initial_state {IS_FLOAT32}.*(bfloat16|BFloat16)",
         initial_state=_STATE.bfloat16(), initial_z=_Z),
    _bad("initial_state_meta", ValueError, f"initial_state {_ON_CPU}", initial_state=_STATE.to("meta"), initial_z=_Z),
    _bad("initial_state_number", TypeError, f"initial_state {IS_TENSOR}float", schema_match="initial_state",
         initial_state=0.0, initial_z=_Z),
    _bad("initial_state_quadratic", ValueError, r"initial_state must be None when quadratic is True, got", public=False,
         initial_state=_STATE, initial_z=_Z, quadratic=True),
    _bad("initial_z_shape", ValueError, r"initial_z must be \[N, H, K\] = \[1, 2, 8\], got \[1, 2, 5\]",
         initial_state=_STATE, initial_z=_Z[..., :5]),
    _bad("initial_z_dtype", TypeError, f"initial_z {IS_FLOAT32}.*(float64|Double)", initial_state=_STATE,
         initial_z=_Z.double()),
    _bad("initial_z_meta", ValueError, f"initial_z {_ON_CPU}", initial_state=_STATE, initial_z=_Z.to("meta")),
    # feature_map, normalize
    _bad("feature_map_unknown", ValueError, "feature_map must be one of none, relu, elu1, exp, got 'softmax'",
         torch_ops=False, feature_map="softmax"),
    _bad("feature_map_int", TypeError, "feature_map must be one of none, relu, elu1, exp, got int", torch_ops=False,
         feature_map=1),
    _bad("feature_map_4", ValueError, "feature_map must be between 0 and 3, got 4", public=False, feature_map=4),
    _bad("feature_map_negative", ValueError, "feature_map must be between 0 and 3, got -1", public=False,
         feature_map=-1),
    _bad("normalize_unknown", ValueError, "normalize must be one of none, sum, mean, clamp, got 'Sum'",
         torch_ops=False, normalize="Sum"),
    _bad("normalize_none_object", TypeError, "normalize must be one of none, sum, mean, clamp, got NoneType",
         schema_match="argument 'normalize'", normalize=None),
    _bad("normalize_4", ValueError, "normalize must be between 0 and 3, got 4", public=False, normalize=4),
    # eps, clamp_min, scale, causal, quadratic
    _bad("eps_huge", ValueError, r"eps must be finite in float32, got 1e\+39", eps=1e39),
    _bad("eps_nan", ValueError, "eps must be finite, got nan", eps=math.nan),
    _bad("eps_string", TypeError, "eps must be a real number, got str", schema_match="argument 'eps'", eps="1e-6"),
    _bad("clamp_min_inf", ValueError, "clamp_min must be finite, got inf", clamp_min=math.inf),
    _bad("clamp_min_none", TypeError, "clamp_min must be a real number, got NoneType",
         schema_match="argument 'clamp_min'", clamp_min=None),
    _bad("scale_nan", ValueError, "scale must be finite, got nan", scale=math.nan),
    _bad("scale_minus_inf", ValueError, "scale must be finite, got -inf", scale=-math.inf),
    _bad("scale_complex", TypeError, "scale must be a real number, got complex", schema_match="argument 'scale'",
         scale=1j),
    _bad("causal_string", TypeError, "causal must be a bool, got str", schema_match="causal", causal="yes"),
    _bad("causal_int", TypeError, "causal must be a bool, got int", torch_ops=False, causal=1),
    _bad("quadratic_string", (TypeError, RuntimeError), "quadratic must be a bool", schema_match="quadratic",
         public=False, quadratic="auto"),
    _bad("return_state_int", TypeError, "return_state must be a bool, got int", torch_ops=False, return_state=1),
    # the backward op
    _bad_backward("grad_out_shape", ValueError, r"grad_out must be \[B, L, H, V\] = \[1, 6, 2, 5\], got \[1, 6, 2, 4\]",
                  grad_out=lambda t: t[..., :4]),
    _bad_backward("grad_out_none", TypeError, f"grad_out {IS_TENSOR}NoneType",
                  schema_match=r"grad_out must be .*got \[0\]", grad_out=None),
    _bad_backward("grad_out_dtype", TypeError, r"grad_out must be .*[fF]loat.*got .*(float16|Half)",
                  grad_out=to(torch.float16)),
    _bad_backward("grad_out_last_stride", ValueError, "grad_out must .*last stride.*1.*got", grad_out=every_other),
    _bad_backward("grad_out_meta", ValueError, f"grad_out {_ON_CPU}", grad_out=to("meta")),
    _bad_backward("grad_state_shape", ValueError,
                  r"grad_state must be \[N, H, K, V\] = \[1, 2, 8, 5\], got \[1, 2, 5, 8\]", grad_state=lambda t: t.mT),
    _bad_backward("grad_state_dtype", TypeError, f"grad_state {IS_FLOAT32}.*(bfloat16|BFloat16)",
                  grad_state=to(torch.bfloat16)),
    _bad_backward("grad_z_shape", ValueError, r"grad_z must be \[N, H, K\] = \[1, 2, 8\], got \[2, 8\]",
                  grad_z=lambda t: t[0]),
    _bad_backward("grad_z_dtype", TypeError, f"grad_z {IS_FLOAT32}.*(float64|Double)", grad_z=to(torch.float64)),
    _bad_backward("state_shape", ValueError, r"state must be \[N, H, K, V\] = \[1, 2, 8, 5\], got \[1, 2, 0, 0\]",
                  state=lambda t: t[:, :, :0, :0]),
    _bad_backward("state_not_contiguous", ValueError, "state must be contiguous",
                  state=lambda t: t.mT.contiguous().mT),
    _bad_backward("state_dtype", TypeError, f"state {IS_FLOAT32}.*(float16|Half)", state=to(torch.float16)),
    _bad_backward("state_quadratic", ValueError, r"state must be \[N, H, K, V\] = \[1, 2, 0, 0\], got \[1, 2, 8, 5\]",
                  quadratic=True),
    _bad_backward("z_shape", ValueError, r"z must be \[N, H, K\] = \[1, 2, 8\], got \[1, 16\]",
                  z=lambda t: t.flatten(1)),
    _bad_backward("z_not_contiguous", ValueError, "z must be contiguous", z=lambda t: t.mT.contiguous().mT),
    _bad_backward("backward_normalize", ValueError, "normalize must be between 0 and 3, got 9", normalize=9),
    _bad_backward("backward_k_den", ValueError, r"k_den must be \[B, M, H, K\]", k_den=lambda t: t[..., :4]),
    _bad_backward("backward_cu_seqlens", ValueError, "cu_seqlens must rise from 0", cu_seqlens=_offsets(0, 5)),
    _bad_backward("backward_initial_z", ValueError, "initial_z must be given together with initial_state, got None",
                  initial_state=_STATE),
]
# fmt: on


def public_kwargs(kwargs):
    """The public function takes names, chooses the form by itself, and returns the states if asked."""
    if kwargs.get("quadratic"):
        return None
    named = {n: x for n, x in kwargs.items() if n != "quadratic"}
    for name, names in (("feature_map", FEATURE_MAPS), ("normalize", NORMALIZERS)):
        if name in named:
            named[name] = names[named[name]]
    return named | {"return_state": True}


SPEC = OpSpec(
    name=NAME,
    public_kwargs=public_kwargs,
    samples=SAMPLES,
    random_sample=random_sample,
    random_calls=2000,
    bad_inputs=BAD_INPUTS,
    good_call=good_call,
    magnitudes=magnitudes,
    dynamic="B L M N",
    resize=resize,
    memory_calls=memory_calls,
)  # fmt: skip
