"""binary_linear: the declaration and the public function."""

from __future__ import annotations

import torch

from ..reference.binary_linear import binary_linear as _definition
from . import _checks, _int8
from ._declaration import OUT_DTYPES
from ._op import op

MAX_DEPTH = 1 << 24  # every sum is exact in float32


def _derive(op, dims, options, tensors):
    depth = options["depth"]
    if dims["V"] != (depth + 7) // 8:
        expected = f"[M, V] with V = ceil(depth / 8) = {(depth + 7) // 8}"
        raise _checks.value_error(op, "x", expected, _checks.shape(tensors["x"]))


def _named(options):
    rest = {k: options[k] for k in ("depth", "unipolar")}
    return _int8.named(options) | rest


OP = op(
    "binary_linear",
    f"x: M V | uint8, weight: N V | uint8, {_int8.EPILOGUE} -> out: M N | out_dtype",
    f"{_int8.OPTIONS}, depth: int in 0..{MAX_DEPTH}, unipolar: bool = False",
    reference=lambda *tensors, **options: _definition(*tensors, **_named(options)),
    saves=None,
    derive=_derive,
    check=_int8.check,
    empty="M N",
    batch="M",
    shards=("M",),
    autocast=False,
    flops=lambda dims, options: (2 * dims["M"] * dims["N"] * options["depth"], 0),
)


def binary_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    depth: int,
    unipolar: bool = False,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    out_scale: float | None = None,
) -> torch.Tensor:
    """Linear layer on bits: ``act(acc * x_scale * w_scale + bias + residual)`` with ``acc = depth - 2 popcount(x ^
    weight)``, the exact product of numbers that are -1 (bit 0) or 1 (bit 1). Nothing is multiplied but the scales.

    Args:
        x: [..., V] uint8, V = ceil(depth / 8), a last stride of 1: bit k % 8 of byte k // 8 for number k, as
            :func:`effvit.ops.sign_bits` makes them. Bits from `depth` on are ignored, here and in weight.
        weight: [N, V] uint8, likewise.
        x_scale: [1] or [...] float32, w_scale: [N] or [1] float32, bias: [N], residual: [..., N], activation,
            out_dtype, out_scale: as in :func:`effvit.ops.int8_linear`.
        depth: K, the numbers of a row, 0 to 2^24.
        unipolar: bits of x stand for 0 and 1, those of weight still for -1 and 1: ``acc = 2 popcount(x & weight) -
            popcount(x)``. For binary attention probabilities times binary values.

    Returns:
        [..., N] in out_dtype, contiguous; int32: acc. Sums are exact, the rest is float32, differentiable in bias,
        residual and the scales. Deterministic; results do not depend on the number of threads.

    Raises:
        TypeError: a tensor argument is not a dense tensor or has the wrong dtype. ValueError: a shape, stride, scale
        or option is outside the above. The message names the argument.

    Sources: XNOR-Net (arXiv:1603.05279), BiViT (arXiv:2211.07091).
    """
    name = OP.name
    for argument, t in (("x", x), ("weight", weight), ("x_scale", x_scale), ("w_scale", w_scale)):
        _checks.check_tensor(name, argument, t)
    if out_dtype not in _int8.DTYPES:
        names = ", ".join(OUT_DTYPES[: len(_int8.DTYPES)])
        raise _checks.type_error(name, "out_dtype", f"one of {names}", out_dtype)
    if x.dim() == 0:
        raise _checks.value_error(name, "x", "[..., V]", _checks.shape(x))
    lead = x.shape[:-1]
    rows = x.flatten(0, -2) if x.dim() > 2 else x[None] if x.dim() == 1 else x
    if x_scale.shape == (1,):
        x_scale = x_scale.expand(rows.shape[0])
    elif x_scale.shape == lead:
        x_scale = x_scale.reshape(rows.shape[0])
    if w_scale.shape == (1,) and weight.dim() == 2:
        w_scale = w_scale.expand(weight.shape[0])
    if isinstance(residual, torch.Tensor) and x.dim() != 2 and residual.dim() == x.dim():
        residual = residual.flatten(0, -2) if residual.dim() > 2 else residual[None]
    out = OP(
        rows, weight, x_scale, w_scale, bias, residual, depth=depth, unipolar=unipolar,
        activation=_checks.index_of(name, "activation", activation, _int8.NAMES),
        out_dtype=_int8.DTYPES.index(out_dtype), out_scale=out_scale,
    )  # fmt: skip
    return out if x.dim() == 2 else out.reshape(*lead, out.shape[-1])
