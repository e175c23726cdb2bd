"""int8_matmul: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.int8_matmul import int8_matmul as _definition
from . import _checks, _integer
from ._op import op

MOST_K = 1 << 20
RESCALE = (
    f"multiplier: int in 0..{_integer.LARGEST} = 0, shift: int in 0..{_integer.MOST_SHIFT} = 0, "
    "{bits}: int in 2..32 = 32, " + _integer.OUT_DTYPE.format(3)
)


def check_rescale(op: str, options: dict) -> None:
    if options["multiplier"] and not options["shift"]:
        raise _checks.value_error(op, "shift", f"between 1 and {_integer.MOST_SHIFT} with a multiplier", 0)


def _derive(op, dims, options, tensors):
    for name in ("a", "b"):
        if tensors[name].dtype == torch.int32:
            raise _checks.type_error(op, name, "int16, int8 or uint8", tensors[name].dtype)
    k, (n, depth) = dims["K"], (dims["R"], dims["C"])
    shown = "[..., N, K]" if options["transpose_b"] else "[..., K, N]"
    if not options["transpose_b"]:
        n, depth = depth, n
    if depth != k:
        raise _checks.value_error(
            op, "b", f"{shown} with K = {k} like a {_checks.shape(tensors['a'])}", _checks.shape(tensors["b"])
        )
    dims["N"] = n


def _check(op, dims, options, tensors):
    check_rescale(op, options)


def _flops(dims, options):
    return torch.Size(dims["..."]).numel() * dims["M"] * dims["N"] * (2 * dims["K"] + 4), 0  # integer operations


OP = op(
    "int8_matmul",
    "a: ... M K | integer, b: ... R C | integer -> out: ... M N | out_dtype",
    f"transpose_b: bool = False, {RESCALE.format(bits='bits')}",
    reference=lambda a, b, **options: _definition(a, b, **_integer.named(options)),
    saves=None,
    limits={"a.K": (0, MOST_K, f"be [..., M, K] with K at most {MOST_K}")},
    derive=_derive,
    check=_check,
    empty="... M N",
    batch="...",
    shards=("...",),
    autocast=False,
    flops=_flops,
)


def int8_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    transpose_b: bool = False,
    scale: float | torch.Tensor | None = None,
    out_scale: float | torch.Tensor | None = None,
    multiplier: int = 0,
    shift: int = 0,
    bits: int = 32,
    out_dtype: torch.dtype = torch.int32,
) -> torch.Tensor:
    """Products of matrices of small integers, batched, requantised in the same pass: the same bits on every device.

    Args:
        a: [..., M, K]; b: [..., K, N], or [..., N, K] with transpose_b. Each int8, uint8 or int16, any strides with a
            last stride of 1, the same leading dims. K up to 1048576.
        scale: what one step of the sums is worth, the product of the scales of a and b; a number, or a tensor of one
            element. out_scale: what one step of the result shall be worth. Both, or neither. Their ratio, from 2^-31
            to 2^30, is taken in float64.
        multiplier, shift: in place of the two: the result is ``sum * multiplier / 2^shift``, ties to even. Multiplier
            from 1 to 2^31 - 1, shift from 1 to 61; 0 and 0: the sum itself.
        bits: the result is within what so many bits hold, 2 to 32, and within out_dtype.
        out_dtype: int32, int16, int8 or uint8 (never below 0).

    Returns:
        [..., M, N] in out_dtype, contiguous; not differentiable. Sums are exact. They saturate at int32, before they
        are rescaled; no int32 tensor is written on the way to a narrower one. Deterministic, bit for bit the formula
        in int64.

    Raises:
        TypeError: a or b is not a dense tensor, or has another dtype; an option has the wrong type.
        ValueError: a shape, stride, device, scale or option is outside the above. The message names the argument.

    Source: I-ViT's QuantMatMul (arXiv:2207.01405).
    """
    rescale = _integer.rescaling(OP.name, "scale", scale, "out_scale", out_scale, multiplier, shift)
    out_type = _integer.as_out_dtype(OP.name, out_dtype)
    return OP(a, b, transpose_b=transpose_b, **rescale, bits=bits, out_dtype=out_type)
