"""window_attention: the declaration, the checks of its geometry and the public function."""

from __future__ import annotations

import math

import torch

from ..reference.window_attention import window_attention as _definition
from ._checks import given_together, value_error
from ._op import op

_MAX_EXTENT = 1 << 24


def _reference(*tensors, window, shift, dilation, halo, **options):
    window, shift, dilation, halo = map(tuple, (window, shift, dilation, halo))
    return _definition(*tensors, window=window, shift=shift, dilation=dilation, halo=halo, **options)


def _derive(op, dims, options, tensors):
    window, shift, dilation, halo = (options[n] for n in ("window", "shift", "dilation", "halo"))
    if any(s >= w for s, w in zip(shift, window, strict=True)):
        raise value_error(op, "shift", f"in [0, window) for window {window}", shift)
    if any((w + 2 * e) * d > _MAX_EXTENT for w, e, d in zip(window, halo, dilation, strict=True)):
        expected = f"such that (window + 2*halo) * dilation is at most {_MAX_EXTENT}"
        raise value_error(op, "dilation", expected, dilation)
    if options["scale"] is not None and tensors["logit_scale"] is not None:
        raise value_error(op, "scale", "None when logit_scale is given", options["scale"])
    given_together(op, tensors, "pad_k", "pad_v")


def _flops(dims, options):
    """q kᵀ and P v; backward: those two again or their transposes, five products."""
    keys = (dims["wh"] + 2 * dims["halo_h"]) * (dims["ww"] + 2 * dims["halo_w"])
    pairs = 2 * dims["B"] * dims["H"] * dims["W"] * dims["h"] * keys
    return pairs * (dims["d"] + dims["dv"]), pairs * (3 * dims["d"] + 2 * dims["dv"])


OP = op(
    "window_attention",
    """q: B H W h d, k: B H W h d, v: B H W h dv, bias_table?: h 2*wh-1+2*halo_h 2*ww-1+2*halo_w | float strided,
    logit_scale?: h | float packed, pad_k?: h d | packed, pad_v?: h dv | packed
    -> out: B H W h dv, lse: B h H W | float32""",
    """window: int[2](wh, ww) in 1..32768, shift: int[2](shift_h, shift_w) in 0..32768 = 0,
    dilation: int[2](dilation_h, dilation_w) in 1..32768 = 1, halo: int[2](halo_h, halo_w) in 0..32768 = 0,
    scale: float? = None, mask_value: float = -100., roll_before_pad: bool = False""",
    reference=_reference,
    saves="out lse",
    packs=("q", "k", "v"),
    limits={
        "q.d": (1, math.inf, "be a tensor with a head dim of at least 1"),
        "v.dv": (1, math.inf, "be a tensor with a head dim of at least 1"),
    },
    derive=_derive,
    empty="B H W h",
    shards=("B", "h"),
    flops=_flops,
)


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias_table: torch.Tensor | None = None,
    logit_scale: torch.Tensor | None = None,
    pad_k: torch.Tensor | None = None,
    pad_v: torch.Tensor | None = None,
    *,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    halo: int | tuple[int, int] = 0,
    scale: float | None = None,
    mask_value: float = -100.0,
    roll_before_pad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Windowed softmax attention over a whole feature map, in one pass.

    No rolled, partitioned, padded or masked copy of the map, no N×N bias and no mask tensor exists in memory, forward
    or backward. Covers Swin v1 and v2, MaxViT block and grid attention, CSWin stripes, HAT's overlapping windows,
    DaViT, Twins, SwinIR and CrossFormer.

    Args:
        q, k: queries and keys, [B, H, W, h, d]: batch, height, width, heads, head dim.
        v: values, [B, H, W, h, dv].
            All three float32, bfloat16 or float16 (one dtype), any strides with a last stride of 1.
        bias_table: relative position bias [h, 2*wh-1+2*halo_h, 2*ww-1+2*halo_w], added to the logits at
            ``[(y_q - y_k) + wh-1+halo_h, (x_q - x_k) + ww-1+halo_w]``, positions counted in tokens of the window. Any
            strides; float32, bfloat16 or float16.
        logit_scale: log-temperature [h] of cosine attention (Swin v2). When given, q and k are L2-normalised and the
            logits are ``exp(min(logit_scale, ln 100)) * cos(q, k)``; ``scale`` must then be None.
        pad_k, pad_v: [h, d] and [h, dv], what tokens outside the map contain (in timm, torchvision and transformers
            the qkv bias: padded tokens join the softmax there). Without them such tokens are excluded.
        window: window height and width in tokens.
        shift: how far the map is rolled up and left before it is cut into windows, in [0, window). Pairs of tokens from
            different sides of the seam get ``mask_value``.
        dilation: distance between neighbouring tokens of a window (MaxViT's grid: window G, dilation H/G).
        halo: tokens by which the key window exceeds the query window on each side (HAT). No wrap-around.
        scale: factor of the logits, d**-0.5 if None.
        mask_value: added to pairs from different shift regions; finite, as in Swin.
        roll_before_pad: timm rolls the map and then pads it; torchvision and transformers (False) pad, then roll.
            They differ where the window does not divide the map.

    Returns:
        ``out`` [B, H, W, h, dv] in the dtype of q, and ``lse`` [B, h, H, W] float32, the natural log-sum-exp of each
        query's logits. Both are differentiable in every tensor argument.

    Accumulates in float32. Deterministic; results do not depend on the number of threads. Under autocast q, k, v and
    the pads are cast, the table and the temperature are not.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; a number is not a number.
        ValueError: a shape, stride, device or value is outside the above. The message names the argument.

    Sources: Swin (arXiv:2103.14030), Swin v2 (2111.09883), MaxViT (2204.01697), CSWin (2107.00652), HAT (2205.04437).
    """
    return OP(
        q, k, v, bias_table, logit_scale, pad_k, pad_v, window=window, shift=shift, dilation=dilation, halo=halo,
        scale=scale, mask_value=mask_value, roll_before_pad=roll_before_pad,
    )  # fmt: skip
