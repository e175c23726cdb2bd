"""int8_linear: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.int8_linear import int8_linear as _definition
from ..reference.int8_prepack import DENSE, packed_width
from . import _int8
from ._checks import shape, value_error
from ._op import op


def _derive(op, dims, options, tensors):
    n, k, weight = dims["N"], dims["K"], [dims["R"], dims["C"]]
    packed = [(n + 15) // 16, packed_width(k)]
    if weight != [n, k] and weight != packed:
        expected = f"[N, K] = [{n}, {k}] or packed by int8_prepack, [{packed[0]}, {packed[1]}], like w_scale and x"
        raise value_error(op, "weight", expected, shape(tensors["weight"]))
    if weight != [n, k] and tensors["x"].is_cuda:
        raise value_error(op, "weight", "plain [N, K] on a GPU", "packed")


def _check(op, dims, options, tensors):
    _int8.check(op, dims, options, tensors)
    n, k = dims["N"], dims["K"]
    if dims["C"] > k:
        _int8.check_label(op, "weight", tensors["weight"], "int8_prepack", DENSE, n, k)


def _flops(dims, options):
    return 2 * dims["M"] * dims["N"] * dims["K"], 0


OP = op(
    "int8_linear",
    f"x: M K | int8, weight: R C | int8, {_int8.EPILOGUE} -> out: M N | out_dtype",
    _int8.OPTIONS,
    reference=lambda *tensors, **options: _definition(*tensors, **_int8.named(options)),
    saves=None,
    limits=_int8.LIMITS,
    derive=_derive,
    check=_check,
    empty="M N",
    batch="M",
    shards=("M",),
    autocast=False,
    flops=_flops,
)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    out_scale: float | None = None,
) -> torch.Tensor:
    """Linear layer on int8 values with everything around it in one pass: ``act(x Wᵀ * x_scale * w_scale + bias +
    residual)``, rounded to a float dtype or requantised to int8. The int32 sums are exact and are never written.

    Args:
        x: [..., K] int8, a last stride of 1; K from 0 to 131072, up to which no sum of products can overflow int32 (but
            one: 131072 times -128 * -128).
        weight: [N, K] int8, or what :func:`effvit.ops.int8_prepack` made of it, which saves packing it in every call
            on a CPU; GPUs take the plain one. The result is the same.
        x_scale: what one step of x is worth: [1], or one number a row, [...] like x without its last dim; float32. A
            row's own number may be infinite or NaN, as that of a row with an infinity or a NaN is; so is its result.
        w_scale: likewise for the output channels of weight: [N] (or [1], if weight is not packed); float32.
        bias: [N]; residual: [..., N]; each float32, bfloat16 or float16.
        activation: "none", "relu", "gelu" (the exact one) or "silu".
        out_dtype: float32, bfloat16, float16, int8 or int32. With int32 the result is the sums, and bias, residual
            and activation must be left out.
        out_scale: what one step of an int8 result is worth; given exactly where out_dtype is int8. Rounded to the
            nearest step, ties to even, saturating at -128 and 127; 0 for NaN.

    Returns:
        [..., N] in out_dtype, contiguous. Sums in int32, the rest in float32. Float results are differentiable in
        bias, residual and the scales, at the speed of PyTorch; for gradients of the quantised values see
        :func:`effvit.ops.fake_quantize_int8`. Deterministic; results do not depend on the number of threads.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype.
        ValueError: a shape, stride, device or option is outside the above; a scale is not positive and finite, or a
            packed weight is one of another shape (where values can be read, on a CPU). The message names the argument.

    Source: symmetric int8 quantisation as in LLM.int8() (arXiv:2208.07339) and SmoothQuant (arXiv:2211.10438).
    """
    return _int8.call(OP, x, (weight,), x_scale, w_scale, bias, residual, activation, out_dtype, out_scale)
