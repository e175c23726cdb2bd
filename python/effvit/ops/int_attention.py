"""int_attention: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.int_attention import int_attention as _definition
from . import _checks, _integer
from ._op import op
from .int8_matmul import RESCALE, check_rescale

MOST_K = 65536  # (128 + 127) * 128 * K < 2^31, also where a kernel offsets one side by 128
MOST_KEYS = 1 << 24


def _check(op, dims, options, tensors):
    _integer.check_shift_exp(op, options)
    check_rescale(op, options)
    if tensors["bias"] is not None and (dims["W"] == 0 or dims["B"] % dims["W"]):
        expected = f"[W, H, L, M] with W a divisor of B = {dims['B']}"
        raise _checks.value_error(op, "bias", expected, _checks.shape(tensors["bias"]))


def _flops(dims, options):
    pairs = dims["B"] * dims["H"] * dims["L"] * dims["M"]
    return pairs * (2 * dims["K"] + 2 * dims["V"] + 28), 0  # integer operations


OP = op(
    "int_attention",
    "q: B L H K | int8, k: B M H K | int8, v: B M H V | int8, bias?: W H L M | int32 -> out: B L H V | out_dtype",
    f"score_multiplier: int in 1..{_integer.LARGEST}, score_shift: int in 1..{_integer.MOST_SHIFT}, "
    f"{_integer.SHIFT_EXP.format(n=15, bits=8)}, score_bits: int in 8..16 = 8, {RESCALE.format(bits='out_bits')}",
    reference=lambda *tensors, **options: _definition(*tensors, **_integer.named(options)),
    saves=None,
    limits={
        "q.K": (1, MOST_K, f"be [B, L, H, K] with K from 1 to {MOST_K}"),
        "k.M": (1, MOST_KEYS, f"be [B, M, H, K] with M from 1 to {MOST_KEYS}"),
    },
    check=_check,
    empty="B L H V",
    batch="B",
    alone="bias",
    shards=("B", "H"),
    autocast=False,
    flops=_flops,
)


def int_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float | torch.Tensor | None = None,
    score_scale: float | torch.Tensor | None = None,
    score_multiplier: int | None = None,
    score_shift: int | None = None,
    x0: int | None = None,
    n: int = 15,
    bits: int = 8,
    deployed: bool = False,
    score_bits: int = 8,
    v_scale: float | torch.Tensor | None = None,
    out_scale: float | torch.Tensor | None = None,
    multiplier: int = 0,
    shift: int = 0,
    out_bits: int = 32,
    out_dtype: torch.dtype = torch.int32,
) -> torch.Tensor:
    """I-ViT's attention with integers alone, in one pass: the same bits on every device.

    Exact int8 products of queries and keys, requantised to scores, plus a bias; Shiftmax over the keys; its exact
    product with the values, requantised. Bit for bit what :func:`int8_matmul`, :func:`requantize`, :func:`shiftmax` and
    :func:`int8_matmul` give one after the other, and no tensor of L times M elements is written.

    Args:
        q: queries [B, L, H, K]; k: keys [B, M, H, K]; v: values [B, M, H, V]; int8, any strides with a last stride of
            1, so slices of a projection [B, L, 3, H, K] as they are. K from 1 to 65536, M from 1 to 2^24.
        bias: [W, H, L, M] int32 in score steps, for sample b that of b % W: a relative position bias, and masks as
            large negative numbers; W divides B. Any strides with a last stride of 1. Its sum with a score saturates at
            int32.
        scale: what one step of q·k is worth: the product of their scales and, usually, K**-0.5; a number or a tensor
            of one element, as are all scales. score_scale: what one step of a score, and of the bias, shall be worth.
        score_multiplier, score_shift: in place of scale, what kernels take: scores are ``q·k * multiplier / 2^shift``,
            ties to even. 1 to 2^31 - 1; 1 to 61.
        x0: in place of score_scale: floor(-1 / score_scale), as :func:`effvit.ops.shiftmax` takes it.
        n, bits, deployed: as there: bits after the point of the exponential; probabilities are in steps of
            2^(1 - bits); whether as in the authors' TVM kernels. The authors' ViT has bits 16, their Swin 8.
        score_bits: scores saturate at so many bits, 8 to 16, before the bias is added.
        v_scale: what one step of v is worth; out_scale: what one step of the result shall be worth. Both, or neither:
            a step of the result is then v_scale * 2^(1 - bits).
        multiplier, shift: in place of the two: the sums of probabilities and values are multiplied by
            ``multiplier / 2^shift``, ties to even. 0 and 0: the sums themselves.
        out_bits: the result is within what so many bits hold, 2 to 32, and within out_dtype.
        out_dtype: int32, int16, int8 or uint8 (never below 0).

    Returns:
        [B, L, H, V] in out_dtype, contiguous; not differentiable. Sums with v saturate at int32, before they are
        rescaled. Deterministic, bit for bit the formula in int64.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype; an option has the wrong type.
        ValueError: a shape, stride, device, scale or option is outside the above. The message names the argument.

    Source: I-ViT (arXiv:2207.01405).
    """
    name = OP.name
    if (scale is None) == (score_multiplier is None):
        raise _checks.value_error(
            name, "scale", "given, or score_multiplier in its place", f"{scale} and score_multiplier {score_multiplier}"
        )
    if scale is not None and score_shift is not None:
        raise _checks.value_error(name, "score_shift", "None where scale is given", score_shift)
    if scale is None and x0 is not None and score_scale is not None:
        raise _checks.value_error(name, "score_scale", "None where score_multiplier and x0 are given", score_scale)
    if (score_multiplier is None) != (score_shift is None):
        raise _checks.value_error(name, "score_shift", "given together with score_multiplier", score_shift)
    if scale is not None:
        if score_scale is None:
            raise _checks.value_error(name, "score_scale", "given together with scale", None)
        step = _integer.as_scale(name, "scale", scale) / _integer.as_scale(name, "score_scale", score_scale)
        if not 2.0**-31 <= step < 2.0**30:
            raise _checks.value_error(name, "score_scale", "such that it divides scale 2^-31 to 2^30 times", step)
        score_multiplier, score_shift = _integer.fixed_point(step)
    if score_scale is None and x0 is None:
        raise _checks.value_error(name, "score_scale", "given, or x0 in its place", None)
    x0 = _integer.as_x0(name, score_scale if x0 is None else None, x0, n, deployed)
    if v_scale is not None:
        v_scale = _integer.as_scale(name, "v_scale", v_scale) * 2.0 ** (1 - _checks.as_int(name, "bits", bits, (2, 16)))
    rescale = _integer.rescaling(name, "v_scale", v_scale, "out_scale", out_scale, multiplier, shift)
    return OP(
        q, k, v, bias, score_multiplier=score_multiplier, score_shift=score_shift, x0=x0, n=n, bits=bits,
        half_bit=not deployed, score_bits=score_bits, **rescale, out_bits=out_bits,
        out_dtype=_integer.as_out_dtype(name, out_dtype),
    )  # fmt: skip
