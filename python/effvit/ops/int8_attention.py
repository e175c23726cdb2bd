"""int8_attention: the declaration and the public function."""

from __future__ import annotations

import math

import torch

from ..reference.int8_attention import BLOCK, float_attention
from ..reference.int8_attention import int8_attention as _definition
from . import _checks
from ._op import op

NAMES = ("exp2", "shiftmax")  # the schema's int is an index into these


def _derive(op, dims, options, tensors):
    q, k, v = (tensors[n] for n in "qkv")
    dims["N"] = (dims["M"] + BLOCK - 1) // BLOCK
    if dims["H"] % dims["G"]:
        raise _checks.value_error(op, "k", f"of heads that divide those of q, {dims['H']}", _checks.shape(k))
    if v.dtype != k.dtype:
        raise _checks.type_error(op, "v", f"{k.dtype} like k", v.dtype)
    for name in ("k_scale", "v_scale"):
        if (tensors[name] is None) == (k.dtype == torch.int8):
            expected = "given where k and v are int8" if tensors[name] is None else "None where k and v are not int8"
            given = None if tensors[name] is None else f"{name} with k {k.dtype}"
            raise _checks.value_error(op, name, expected, given)
    if tensors["k_mean"] is not None and k.dtype != torch.int8 and not options["smooth_k"]:
        raise _checks.value_error(op, "k_mean", "None without smooth_k", "k_mean")


def _check(op, dims, options, tensors):
    if tensors["bias"] is not None and (dims["W"] == 0 or dims["B"] % dims["W"]):
        expected = f"[W, H, L, M] with W a divisor of B = {dims['B']}"
        raise _checks.value_error(op, "bias", expected, _checks.shape(tensors["bias"]))
    scale = tensors["k_scale"]
    if scale is not None and _checks.has_readable_values(scale) and (scale < 0).any():
        where = (scale < 0).nonzero()[0].tolist()
        raise _checks.value_error(op, "k_scale", "at least 0", f"{scale[tuple(where)].item()} at {where}")


def _flops(dims, options):
    return 2 * dims["B"] * dims["H"] * dims["L"] * dims["M"] * (dims["K"] + dims["V"]), 0


OP = op(
    "int8_attention",
    """q: B L H K, k: B M G K | number, v: B M G V | number, k_scale?: B N G | float32 packed,
    v_scale?: B N G V | float32 packed, k_mean?: B G K | float32 packed, bias?: W H L M | float
    -> out: B L H V, lse: B H L | float32""",
    "scale: float? > 0 = None, causal: bool = False, smooth_k: bool = True, exponential: int in 0..1 = 0",
    reference=_definition,
    saves=None,
    limits={
        "q.K": (1, 256, "have a head dim between 1 and 256"),
        "v.V": (1, 256, "have a head dim between 1 and 256"),
        "k.M": (1, math.inf, "have at least one key"),
        "k.G": (1, math.inf, "have at least one head"),
    },
    derive=_derive,
    check=_check,
    empty="B L H",
    alone="bias",
    shards=("B",),
    autocast=False,
    flops=_flops,
    through=float_attention,
)


def int8_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    k_mean: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    smooth_k: bool = True,
    exponential: str = "exp2",
    return_lse: bool = False,
):
    r"""Softmax attention whose products are those of int8: SageAttention, for inference.

    Queries are quantised by row, keys by head and block of 64 after their mean over the tokens is taken off, which no
    softmax sees; values by channel and block of 64. Within a block, weights are rounded to 0..127 of the largest;
    blocks are added up in float32, each with the sum of its rounded weights. Nothing of the size [L, M] is written.

    Args:
        q: queries [B, L, H, K]: batch, tokens, heads, head dim; K at most 256. float32, bfloat16 or float16, any
            strides with a last stride of 1, so that slices of a fused projection are taken as they lie.
        k, v: keys [B, M, G, K] and values [B, M, G, V], V at most 256, M at least 1; G divides H: query head h takes
            head h // (H / G). One dtype, float32, bfloat16 or float16; or int8, what :class:`effvit.layers.Int8KVCache`
            keeps: then k_scale and v_scale are given.
        k_scale: [B, ceil(M / 64), G] float32, at least 0: what one step of a block of 64 keys is worth.
        v_scale: [B, ceil(M / 64), G, V] float32, likewise of each channel of the values.
        k_mean: [B, G, K] float32: of float keys, taken off in place of their mean; of int8 keys, what was taken off
            (only lse needs it).
        bias: [W, H, L, M] float32, bfloat16 or float16, added to the scaled scores, -inf for what is masked: sample b
            has bias[b % W]. Any strides with a last stride of 1, so that one may be expanded over the heads.
        scale: factor of the scores, positive; K**-0.5 if None.
        causal: query i sees keys up to i + M - L: the last query sees all.
        smooth_k: take the mean off float keys.
        exponential: "exp2", 127 * 2^x within 0.02 before it is rounded; or "shiftmax", I-ViT's, of shifts alone, which
            is off by up to 6.
        return_lse: return lse as well.

    Returns:
        out [B, L, H, V] in the dtype of q, zeros for a query that sees no key; with return_lse (out, lse), lse
        [B, H, L] float32, the natural log-sum-exp of each query's scores, -inf for such a query. Numbers that are not
        finite make results that are not finite. Differentiable in floats, straight through the roundings, at the speed
        and memory of PyTorch. Deterministic; integers are the same on every device, and results do not depend on the
        number of threads.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride, device or option is outside the above. The message names the argument.

    Sources: SageAttention (arXiv:2410.02367), I-ViT (arXiv:2207.01405), XStreamVGGT (arXiv:2601.01204).
    """
    index = _checks.index_of(OP.name, "exponential", exponential, NAMES)
    return_lse = _checks.as_bool(OP.name, "return_lse", return_lse)
    out, lse = OP(
        q, k, v, k_scale, v_scale, k_mean, bias, scale=scale, causal=causal, smooth_k=smooth_k, exponential=index
    )  # fmt: skip
    return (out, lse) if return_lse else out
