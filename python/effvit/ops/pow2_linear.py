"""pow2_linear: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.pow2_linear import pow2_linear as _definition
from . import _checks, _int8
from ._op import op


def _check(op, dims, options, tensors):
    _int8.check(op, dims, options, tensors)
    weight, most = tensors["weight"], 2 ** (options["bits"] - 1) - 1
    if _checks.has_readable_values(weight) and weight.numel():
        low, high = (int(t) for t in weight.aminmax())
        if low < -most or high > most:
            expected = f"codes between -{most} and {most} with bits = {options['bits']}"
            raise _checks.value_error(op, "weight", expected, low if low < -most else high)


def _named(options):
    return _int8.named(options) | {k: options[k] for k in ("bits", "right")}


OP = op(
    "pow2_linear",
    f"x: M K | integer, weight: N K | int8, {_int8.EPILOGUE} -> out: M N | out_dtype",
    f"{_int8.OPTIONS}, bits: int in 2..5 = 4, right: int in 0..31 = 0",
    reference=lambda *tensors, **options: _definition(*tensors, **_named(options)),
    saves=None,
    limits=_int8.LIMITS,
    check=_check,
    empty="M N",
    batch="M",
    shards=("M",),
    autocast=False,
    flops=lambda dims, options: (2 * dims["M"] * dims["N"] * dims["K"], 0),
)


def pow2_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    bits: int = 4,
    right: int = 0,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    out_scale: float | None = None,
) -> torch.Tensor:
    """Linear layer whose weights are powers of two, by shifts and additions: ``act(acc * x_scale * w_scale + bias +
    residual)``, ``acc = sum of sign * floor(x * 2^p)``, p = |code| - 1 - right: x shifted left, or right where p < 0.

    Args:
        x: [..., K] integers, int8, uint8, int16 or int32, a last stride of 1; K at most 131072.
        weight: [N, K] int8, codes: 0 for 0, else the sign times 1 to 2^(bits - 1) - 1. The layer Pow2Linear makes them
            of float weights.
        x_scale, w_scale, bias, residual, activation, out_dtype, out_scale: as in :func:`effvit.ops.int8_linear`; a
            scale that is a power of two is a shift as well.
        bits: of a code, 2 to 5: 4 are a sign and powers 2^0 to 2^6, 5 are 2^0 to 2^14.
        right: by how much all exponents are lower. 0: left shifts, every term exact. bits = 5, right = 14: 2^-14 to 1,
            DeepShift's and ShiftAddViT's MatShift on fixed-point x. Every term is rounded down on its own, as an
            arithmetic shift does.

    Returns:
        [..., N] in out_dtype, contiguous; int32: acc. acc is exact (K * 2^31 * 2^14 < 2^63) and saturates at int32 in
        the end; the rest is float32, differentiable in bias, residual and the scales. Deterministic. int8 x with bits
        <= 4 and right = 0 runs as an int8 product, whose instructions are several times faster than shifts; to save
        the packing of the weight in every call, give its values to :func:`effvit.ops.int8_prepack` and int8_linear.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype. ValueError: a shape, stride, scale,
        code or option is outside the above (values where they can be read, on a CPU). The message names the argument.

    Sources: ShiftAddViT (arXiv:2306.06446), DeepShift (arXiv:1905.13298).
    """
    return _int8.call(
        _With(bits=bits, right=right), x, (weight,), x_scale, w_scale, bias, residual, activation, out_dtype, out_scale
    )


class _With:
    """The op with some options given."""

    name = OP.name

    def __init__(self, **options):
        self.options = options

    def __call__(self, *tensors, **options):
        return OP(*tensors, **options, **self.options)
