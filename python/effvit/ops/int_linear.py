"""int_linear: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.int8_prepack import DENSE, packed_width
from ..reference.int_linear import int_linear as _definition
from . import _checks, _int8, _integer
from ._op import op

MAX_K = 131071  # 128 * 128 * K < 2^31: no sum of products overflows int32


def _derive(op, dims, options, tensors):
    k, rows, columns = dims["K"], dims["R"], dims["C"]
    if columns == k:
        dims["N"] = rows
        return
    weight, width = tensors["weight"], packed_width(k)
    if columns != width:
        expected = f"[N, K] = [N, {k}] or packed by int8_prepack, [ceil(N / 16), {width}], like x"
        raise _checks.value_error(op, "weight", expected, _checks.shape(weight))
    if tensors["x"].is_cuda:
        raise _checks.value_error(op, "weight", "plain [N, K] on a GPU", "packed")
    name = "multiplier" if tensors["bias"] is None else "bias"
    vector = tensors[name]
    if vector is None:
        raise _checks.value_error(op, "bias", "given, or multiplier, where weight is packed: they say what N is", None)
    _checks.check_tensor(op, name, vector)
    if vector.dim() != 1 or (vector.shape[0] + 15) // 16 != rows:
        expected = f"[N] with ceil(N / 16) = {rows} like the packed weight"
        raise _checks.value_error(op, name, expected, _checks.shape(vector))
    dims["N"] = vector.shape[0]


def _check(op, dims, options, tensors):
    _checks.given_together(op, tensors, "multiplier", "shift")
    for name in ("residual_multiplier", "residual_shift"):
        _checks.given_together(op, tensors, "residual", name)
    if tensors["multiplier"] is None:
        if tensors["residual"] is not None:
            raise _checks.value_error(op, "multiplier", "given together with residual", None)
        if options["bits"] != 8:
            raise _checks.value_error(op, "bits", "left at 8 without multiplier", options["bits"])
    _integer.check_rescaling(op, tensors, "multiplier", "shift")
    _integer.check_rescaling(op, tensors, "residual_multiplier", "residual_shift")
    if dims["C"] > dims["K"]:
        _int8.check_label(op, "weight", tensors["weight"], "int8_prepack", DENSE, dims["N"], dims["K"])


def _flops(dims, options):
    return dims["M"] * dims["N"] * (2 * dims["K"] + 8), 0  # integer operations, those of the epilogue too


OP = op(
    "int_linear",
    "x: M K | int8, weight: R C | int8, multiplier?: N | int32 packed, shift?: N | int32 packed, "
    "bias?: N | int32 packed, residual?: M N | integer, residual_multiplier?: N | int32 packed, "
    "residual_shift?: N | int32 packed -> out: M N | out_dtype",
    "bits: int in 2..32 = 8, out_dtype: int in 3..6",
    reference=lambda *tensors, **options: _definition(*tensors, **_integer.named(options)),
    saves=None,
    limits={"x.K": (0, MAX_K, f"be [M, K] with K at most {MAX_K}, or the int32 sums could overflow")},
    derive=_derive,
    check=_check,
    empty="M N",
    batch="M",
    shards=("M",),
    autocast=False,
    flops=_flops,
)


def int_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    multiplier: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    residual_multiplier: torch.Tensor | None = None,
    residual_shift: torch.Tensor | None = None,
    *,
    bits: int = 8,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Linear layer of integers alone: ``(x Wᵀ + bias) * multiplier / 2^shift + residual * residual_multiplier /
    2^residual_shift``, each rounded to the nearest, ties to even. The int32 sums are exact and are never written.

    Args:
        x: [..., K] int8, a last stride of 1; K from 0 to 131071, up to which no sum of products can overflow int32.
        weight: [N, K] int8, or what :func:`effvit.ops.int8_prepack` made of it, which saves packing it in every call
            on a CPU; GPUs take the plain one. The result is the same. A packed one needs bias or multiplier, which say
            what N is.
        multiplier, shift: [N] int32, of the output channels, as :func:`effvit.integer.linear_constants` or
            :func:`effvit.integer.multipliers` makes them. |multiplier| below 2^31, shift 1 to 61; wrong values are an
            error where they can be read, on a CPU. Without them the result is the sum plus bias itself.
        bias: [N] int32, added to the sum, in its steps; that saturates at what int32 holds.
        residual: [..., N] int32, int16, int8 or uint8, a last stride of 1, with its own two [N] int32; only where
            there is a multiplier. It is rounded by itself and added before the result saturates.
        bits: a rescaled result is within what so many bits hold, 2 to 32, and within out_dtype. Without multiplier
            the result may be all that out_dtype holds, and bits must be left out.
        out_dtype: int8, uint8 (never below 0), int16 or int32. None: int8, without multiplier int32.

    Returns:
        [..., N] in out_dtype, contiguous, saturating; not differentiable. Bit for bit the formula in int64, on every
        device. Deterministic; results do not depend on the number of threads.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride, device, value or option is outside the above, or a packed weight is one of another
            shape or kind (where values can be read, on a CPU). The message names the argument.

    Source: I-ViT's QuantLinear and the QuantAct that follows it (arXiv:2207.01405).
    """
    name = OP.name
    _checks.check_tensor(name, "x", x)
    if x.dim() == 0:
        raise _checks.value_error(name, "x", "[..., K]", _checks.shape(x))
    if out_dtype is None:
        out_dtype = torch.int32 if multiplier is None else torch.int8
    options = {"bits": bits, "out_dtype": _integer.as_out_dtype(name, out_dtype)}
    rows = _rows(x)
    if isinstance(residual, torch.Tensor) and residual.dim() == x.dim():
        residual = _rows(residual)
    out = OP(rows, weight, multiplier, shift, bias, residual, residual_multiplier, residual_shift, **options)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], out.shape[-1])


def _rows(t: torch.Tensor) -> torch.Tensor:
    """[..., C] -> [rows, C]."""
    return t.flatten(0, -2) if t.dim() > 2 else t[None] if t.dim() == 1 else t
