"""fake_quantize_int8: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.fake_quantize_int8 import fake_quantize_int8 as _definition
from . import _checks
from ._op import op
from .quantize_int8 import NAMES, ROUNDINGS


def _check(op, dims, options, tensors):
    _checks.check_scales(op, tensors, "scale")


def _backward(grad_out, x, scale, *, round):
    if scale is None:
        return grad_out, None
    g, x = grad_out.float(), x.float()
    y = x / scale[..., None]
    inside = y.abs() <= 127
    steps = torch.where(inside, ROUNDINGS[NAMES[round]](y) - y, 127 * y.sign()).detach()  # rounding moves with y
    return torch.where(inside, g, torch.zeros_like(g)), (g * steps).sum(-1)


def _flops(dims, options):
    elements = torch.Size(dims["..."]).numel() * dims["K"]
    return 4 * elements, 4 * elements  # a maximum, a division, a rounding, a product


OP = op(
    "fake_quantize_int8",
    "x: ... K, scale?: ... | float32 strided -> out: ... K",
    "round: int in 0..1 = 0",
    reference=lambda x, scale, round: _definition(x, scale, round=NAMES[round]),
    backward=_backward,
    check=_check,
    empty="... K",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=_flops,
)


def fake_quantize_int8(x: torch.Tensor, scale: torch.Tensor | None = None, *, round: str = "even") -> torch.Tensor:
    """What :func:`effvit.ops.quantize_int8` keeps of x: ``q * scale``, with a gradient to train through.

    Args:
        x: [..., K] float32, bfloat16 or float16, a last stride of 1.
        scale: what one step is worth, float32, positive and finite, [...] or of one element; None: the largest |x| of
            each row of K divided by 127 (1 where that is 0).
        round: ties "even" or "away" from zero.

    Returns:
        [..., K] in the dtype of x, contiguous. A row with a NaN or an infinity is NaN where scale is None. Computed in
        float32 and rounded once.

    Differentiable straight through: the derivative of rounding is taken to be 1. So dx is the gradient itself where
    scale is None, and with a given scale 0 where |x| exceeds 127 steps. A given scale gets the gradient of LSQ
    (arXiv:1902.08153): ``round(x / scale) - x / scale``, +-127 where x exceeds that, summed over its row.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride, scale or option is outside the above. The message names the argument.
    """
    name = OP.name
    _checks.check_tensor(name, "x", x)
    rounding = _checks.index_of(name, "round", round, NAMES)
    if x.dim() == 0:
        raise _checks.value_error(name, "x", "[..., K]", _checks.shape(x))
    if scale is not None:
        _checks.check_tensor(name, "scale", scale)
        if scale.numel() == 1:
            scale = scale.reshape([1] * (x.dim() - 1)).expand(x.shape[:-1])
    return OP(x, scale, round=rounding)
