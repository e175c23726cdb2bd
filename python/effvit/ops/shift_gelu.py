"""shift_gelu: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.shift_gelu import shift_gelu as _definition
from . import _checks, _integer
from ._op import op

FACTOR = 1.702  # gelu(x) is about x * sigmoid(1.702 x)


def _check(op, dims, options, tensors):
    _integer.check_shift_exp(op, options)


def _flops(dims, options):
    return 25 * torch.Size(dims["..."]).numel() * dims["C"], 0  # integer operations


OP = op(
    "shift_gelu",
    "x: ... C | integer -> out: ... C | out_dtype",
    f"{_integer.SHIFT_EXP.format(n=23, bits=8)}, safe_max: bool = True, multiplier: int in 0..{_integer.LARGEST} = 0, "
    f"shift: int in 1..{_integer.MOST_SHIFT} = 31, {_integer.OUT_DTYPE.format(3)}",
    reference=lambda x, **options: _definition(x, **_integer.named(options)),
    saves=None,
    check=_check,
    empty="... C",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=_flops,
)


def shift_gelu(
    x: torch.Tensor,
    scale: float | torch.Tensor | None = None,
    *,
    x0: int | None = None,
    out_scale: float | torch.Tensor | None = None,
    n: int = 23,
    bits: int = 8,
    safe_max: bool = True,
    deployed: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """I-ViT's ShiftGELU: ``x * sigmoid(1.702 x)`` with integers alone, the same bits on every device.

    Args:
        x: [..., C] int32, int16, int8 or uint8, any values, a last stride of 1. The sigmoid's exponentials are relative
            to the row's maximum.
        scale: what one step of x is worth: a number, or a tensor of one element. 1 / (1.702 * scale) is at most
            (2^31 - 1) >> n, 255 with n = 23.
        x0: what kernels take: floor(-1 / (1.702 * scale)), computed in float64. In place of scale, where there is no
            out_scale.
        out_scale: what one step of the result shall be worth: it is requantised in the same pass, ties to even. None:
            a step is scale * 2^(1 - bits).
        n: bits after the point of the exponential, 4 to 30.
        bits: the sigmoid is in steps of 2^(1 - bits). 2 to 16.
        safe_max: the maximum is at least 0. Without it, as in the authors' code, rows of negative numbers have an
            exponential beyond int32. It counts as 2^31 - 1 here; rows far below 0, where gelu is 0, come out as
            multiples of x.
        deployed: as the authors' TVM kernels have it: see :func:`effvit.ops.shiftmax`.
        out_dtype: int32, int16, int8 or uint8; None: int8 where out_scale is given, else int32. Results saturate, at
            int32 also before they are requantised.

    Returns:
        [..., C] in out_dtype, contiguous; not differentiable. Deterministic, bit for bit the formula in int64.

    Raises:
        TypeError: x is not a dense tensor of these dtypes; an option has the wrong type.
        ValueError: a shape, stride, scale or option is outside the above. The message names the argument.

    Source: I-ViT (arXiv:2207.01405).
    """
    name = OP.name
    _checks.check_tensor(name, "x", x)
    x0 = _integer.as_x0(name, scale, x0, n, deployed, FACTOR)
    options = {"x0": x0, "n": n, "bits": bits, "half_bit": not deployed, "safe_max": safe_max}
    if out_scale is not None:
        step = _integer.as_scale(name, "scale", scale) * 2.0 ** (1 - _checks.as_int(name, "bits", bits, (2, 16)))
        options |= _integer.fixed_point_option(name, step / _integer.as_scale(name, "out_scale", out_scale))
    if out_dtype is None:
        out_dtype = torch.int32 if out_scale is None else torch.int8
    return OP(x, **options, out_dtype=_integer.as_out_dtype(name, out_dtype))
