"""quantize_int8: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.quantize_int8 import ROUNDINGS
from ..reference.quantize_int8 import quantize_int8 as _definition
from . import _checks
from ._op import op

NAMES = tuple(ROUNDINGS)  # the schema's int is an index into these
GRANULARITIES = ("token", "tensor", "block")


def _check(op, dims, options, tensors):
    _checks.check_scales(op, tensors, "scale")


def _flops(dims, options):
    return 3 * torch.Size(dims["..."]).numel() * dims["K"], 0  # a maximum, a division, a rounding


OP = op(
    "quantize_int8",
    "x: ... K, scale?: ... | float32 strided, excluded?: K | int8 packed -> q: ... K | int8, out_scale: ... | float32",
    "round: int in 0..1 = 0",
    reference=lambda x, scale, excluded, round: _definition(x, scale, excluded, round=NAMES[round]),
    saves=None,
    check=_check,
    empty="...",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=_flops,
)


def quantize_int8(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    excluded: torch.Tensor | None = None,
    *,
    granularity: str = "token",
    block: int = 128,
    round: str = "even",
    outlier_threshold: float = 0.0,
):
    """Symmetric int8 quantisation in one pass: ``q = clamp(round(x / scale), -127, 127)``.

    Args:
        x: [..., K] float32, bfloat16 or float16, a last stride of 1.
        scale: what one step is worth, float32, positive and finite, of the shape that the result has or of one
            element; None: the largest |x| of a token, block or tensor divided by 127 (1 where that is 0).
        excluded: [K] int8 or bool, not 0 for columns to leave out: they do not count for scales, and their q is 0.
        granularity: "token": a scale for each row of K; "tensor": one; "block": one for each `block` neighbours in a
            row, which must divide K.
        round: ties "even" or "away" from zero.
        outlier_threshold: if positive, columns in which any |x| reaches it are left out, as LLM.int8() does. Finding
            them waits for the device. excluded must be None then.

    Returns:
        (q, scale), with outlier_threshold (q, scale, idx). q: [..., K] int8. scale: float32; "token" [...], "tensor"
        [1], "block" [..., K / block]. idx: int64, the columns left out.
        A row with a NaN or an infinity has that as its scale (NaN, infinity) and zeros for NaN, so that what is
        computed with it is not finite either. Computed in float32 with an IEEE division: the same on every device.
        Not differentiable: see :func:`effvit.ops.fake_quantize_int8`.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride, scale or option is outside the above. The message names the argument.

    Sources: LLM.int8() (arXiv:2208.07339), SmoothQuant (arXiv:2211.10438).
    """
    name = OP.name
    _checks.check_tensor(name, "x", x)
    _checks.check_dtype(name, "x", x)
    _checks.index_of(name, "granularity", granularity, GRANULARITIES)
    rounding = _checks.index_of(name, "round", round, NAMES)
    threshold = _checks.as_finite(name, "outlier_threshold", outlier_threshold)
    if threshold < 0:
        raise _checks.value_error(name, "outlier_threshold", "at least 0", threshold)
    if x.dim() == 0:
        raise _checks.value_error(name, "x", "[..., K]", _checks.shape(x))
    for argument, t in (("scale", scale), ("excluded", excluded)):
        if t is not None:
            _checks.check_tensor(name, argument, t)
    if excluded is not None and excluded.dtype == torch.bool:
        excluded = excluded.view(torch.int8)
    shape, idx = x.shape, None
    if excluded is not None and (threshold > 0 or granularity == "block"):
        expected = "None with outlier_threshold or with granularity block"
        raise _checks.value_error(name, "excluded", expected, _checks.shape(excluded))
    if threshold > 0:
        if granularity == "block":
            raise _checks.value_error(name, "outlier_threshold", "0 with granularity block", threshold)
        found = (x.detach().abs() >= threshold).flatten(0, -2).any(0) if x.dim() > 1 else x.detach().abs() >= threshold
        idx, excluded = found.nonzero()[:, 0], found.to(torch.int8)
    if granularity == "tensor" and scale is None:
        kept = x.detach() if excluded is None else x.detach().masked_fill(excluded != 0, 0)
        largest = kept.abs().amax().float() if kept.numel() else x.new_zeros((), dtype=torch.float32)
        scale = torch.where(largest == 0, 1.0, largest / 127)
        if not bool(torch.isfinite(scale)) if _checks.has_readable_values(scale) else False:
            raise _checks.value_error(name, "x", "finite with granularity tensor", scale.item())
    if granularity == "block":
        if not _checks.is_int(block) or block <= 0 or shape[-1] % block:
            raise _checks.value_error(name, "block", f"a positive divisor of K = {shape[-1]}", repr(block))
        x = x.unflatten(-1, (shape[-1] // block, block))
    rows = x.shape[:-1]
    given = scale
    if scale is not None and scale.numel() == 1:
        scale = scale.reshape([1] * len(rows)).expand(rows)
    q, scales = OP(x, scale, excluded, round=rounding)
    if granularity == "block":
        q = q.flatten(-2)
    elif granularity == "tensor":
        scales = given.reshape(1).clone() if given.numel() == 1 else scales
    return (q, scales) if idx is None else (q, scales, idx)
