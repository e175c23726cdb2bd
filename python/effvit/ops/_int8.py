"""What the int8 products declare alike: the epilogue's arguments and checks, and the public functions' arguments."""

from __future__ import annotations

import torch

from ..reference.int8_linear import ACTIVATIONS
from ..reference.int8_prepack import labelled
from . import _checks
from ._declaration import OUT_DTYPES

NAMES = tuple(ACTIVATIONS)  # the schema's int is an index into these
DTYPES = tuple(getattr(torch, name) for name in OUT_DTYPES[:5])
MAX_K = 131072  # 128 * 127 * K < 2^31: the int32 sums are exact
EPILOGUE = "x_scale: M | float32 strided, w_scale: N | float32 packed, bias?: N | float packed, residual?: M N | float"
OPTIONS = "activation: int in 0..3 = 0, out_dtype: int in 0..4 = 0, out_scale: float? > 0 = None"
LIMITS = {"x.K": (0, MAX_K, f"be [M, K] with K at most {MAX_K}, or the int32 sums could overflow")}


def check(op, dims, options, tensors) -> None:
    """Which parts of the epilogue an output dtype takes; scales."""
    dtype, scale = OUT_DTYPES[options["out_dtype"]], options["out_scale"]
    if (dtype == "int8") != (scale is not None):
        expected = "given where the output is int8" if scale is None else "None where the output is not int8"
        raise _checks.value_error(op, "out_scale", expected, f"{scale} with out_dtype {dtype}")
    if dtype == "int32":
        for name in ("bias", "residual"):
            if tensors[name] is not None:
                raise _checks.value_error(op, name, "None where the output is int32", _checks.shape(tensors[name]))
        if options["activation"]:
            raise _checks.value_error(op, "activation", "none where the output is int32", NAMES[options["activation"]])
    _checks.check_scales(op, tensors, "x_scale", "w_scale", of_rows="x_scale")


def check_label(op, name: str, packed, by: str, kind: int, n: int, k: int) -> None:
    """That `packed` is what `by` made of a weight [n, k], where the values can be read."""
    if packed.shape[0] == 0 or not _checks.has_readable_values(packed):
        return
    found, *of = labelled(packed)
    if found != kind:
        raise _checks.value_error(op, name, f"packed by {by}", "something else of that size")
    if of != [n, k]:
        raise _checks.value_error(op, name, f"packed by {by} from [N, K] = [{n}, {k}]", f"one of {of}")


def named(options: dict) -> dict:
    """The schema's options as the reference takes them."""
    return {
        "activation": NAMES[options["activation"]], "out_dtype": DTYPES[options["out_dtype"]],
        "out_scale": options["out_scale"],
    }  # fmt: skip


def _size(shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def call(op, x, weights, x_scale, w_scale, bias, residual, activation, out_dtype, out_scale):
    """The op on x [..., K]: leading dims made one, scales of one element repeated."""
    name = op.name
    for argument, t in (("x", x), ("x_scale", x_scale), ("w_scale", w_scale)):
        _checks.check_tensor(name, argument, t)
    if out_dtype not in DTYPES:
        raise _checks.type_error(name, "out_dtype", f"one of {', '.join(OUT_DTYPES[: len(DTYPES)])}", out_dtype)
    options = {
        "activation": _checks.index_of(name, "activation", activation, NAMES),
        "out_dtype": DTYPES.index(out_dtype), "out_scale": out_scale,
    }  # fmt: skip
    if x.dim() == 0:
        raise _checks.value_error(name, "x", "[..., K]", _checks.shape(x))
    lead = x.shape[:-1]
    rows = x.flatten(0, -2) if x.dim() > 2 else x[None] if x.dim() == 1 else x
    if x_scale.shape == (1,):
        x_scale = x_scale.expand(rows.shape[0])
    elif x_scale.shape == lead:
        x_scale = x_scale.reshape(rows.shape[0])
    elif x.dim() != 2:
        raise _checks.value_error(name, "x_scale", f"[1] or {_size(lead)} like x", _checks.shape(x_scale))
    if w_scale.shape == (1,) and isinstance(weights[0], torch.Tensor) and weights[0].dim() == 2:
        plain = weights[0].shape[-1] <= x.shape[-1]
        w_scale = w_scale.expand(weights[0].shape[0]) if plain else w_scale
    if isinstance(residual, torch.Tensor) and x.dim() != 2 and residual.dim() == x.dim():
        residual = residual.flatten(0, -2) if residual.dim() > 2 else residual[None]
    out = op(rows, *weights, x_scale, w_scale, bias, residual, **options)
    return out if x.dim() == 2 else out.reshape(*lead, out.shape[-1])
