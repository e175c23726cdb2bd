"""What the integer-only operators declare alike: their options, checks, and integers from scales.

Integers that stand for scales are computed here and nowhere else, in float64 and from the scales as they are given:
kernels get integers.
"""

from __future__ import annotations

import math

import torch

from . import _checks
from ._declaration import OUT_DTYPES

DTYPES = {getattr(torch, name): i for i, name in enumerate(OUT_DTYPES) if "int" in name}
LARGEST = 2**31 - 1
LEAST_N, MOST_N = 4, 30
SHIFT_EXP = (
    f"x0: int in -{LARGEST}..-1, n: int in {LEAST_N}..{MOST_N} = {{n}}, bits: int in 2..16 = {{bits}}, "
    "half_bit: bool = True"
)
OUT_DTYPE = "out_dtype: int in 3..6 = {}"


def check_shift_exp(op: str, options: dict) -> None:
    """The largest value of the exponential, -x0 << n, must fit into int32: every other number is smaller then."""
    most = LARGEST >> options["n"]
    if -options["x0"] > most:
        raise _checks.value_error(op, "x0", f"between -{most} and -1 with n = {options['n']}", options["x0"])


def named(options: dict) -> dict:
    """The schema's options as references take them."""
    return {**options, "out_dtype": getattr(torch, OUT_DTYPES[options["out_dtype"]])}


def as_scale(op: str, name: str, x: object) -> float:
    """A positive finite number, or a tensor of one -> a float. A tensor is read, which waits for its device."""
    if isinstance(x, torch.Tensor) and x.numel() == 1:
        x = x.item()
    return _checks.as_positive(op, name, x)


def as_x0(op: str, scale: object, x0: object, n: object, deployed: object, factor: float = 1.0) -> int:
    """floor(-1 / (factor * scale)); deployed: int(-1 / (factor * scale) - 1), one less where the quotient is whole.

    Checked against what n leaves room for. An x0 that is given is it.
    """
    if (scale is None) == (x0 is None):
        raise _checks.value_error(op, "scale", "given, or x0 in its place", f"{scale} and x0 {x0}")
    if x0 is not None:
        return _checks.as_int(op, "x0", x0, (-LARGEST, -1))
    step = factor * as_scale(op, "scale", scale)
    n = _checks.as_int(op, "n", n, (LEAST_N, MOST_N))
    x0 = int(-1.0 / step - 1.0) if _checks.as_bool(op, "deployed", deployed) else math.floor(-1.0 / step)
    most = LARGEST >> n
    if -x0 > most:
        least = (
            f"1 / scale at most {most / factor:.9g} with n = {n}"
            if factor == 1
            else (f"1 / ({factor} * scale) at most {most} with n = {n}")
        )
        raise _checks.value_error(op, "scale", f"such that x0 fits: {least}", f"{step / factor:.9g}")
    return x0


def as_out_dtype(op: str, dtype: object) -> int:
    if dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise _checks.type_error(op, "out_dtype", f"one of {names}", dtype)
    return DTYPES[dtype]


def fixed_point(ratio: float) -> tuple[int, int]:
    """(m, c) with m / 2^c the nearest to a positive ratio, 2^30 <= m < 2^31: its mantissa, a half rounded up."""
    mantissa, exponent = math.frexp(ratio)
    m = math.floor(mantissa * 2.0**31 + 0.5)  # exact: 53 bits
    return (m, 31 - exponent) if m < 2**31 else (m // 2, 30 - exponent)


MOST_SHIFT = 61


def check_integers(op: str, tensors: dict, name: str, low: int, high: int) -> None:
    """Values of a [C] tensor, where they can be read."""
    t = tensors[name]
    if t is None or not _checks.has_readable_values(t):
        return
    wrong = (t < low) | (t > high)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise _checks.value_error(op, name, f"between {low} and {high}", f"{int(t[at])} at [{at}]")


def check_rescaling(op: str, tensors: dict, multiplier: str, shift: str) -> None:
    """What both may be."""
    check_integers(op, tensors, multiplier, -LARGEST, LARGEST)
    check_integers(op, tensors, shift, 1, MOST_SHIFT)


def fixed_points(op: str, name: str, scale: object, out_scale: object, x: torch.Tensor):
    """(m, c) of scale / out_scale for every column of x: [C] int32 each, on its device."""
    ratio = _ratios(op, name, scale, x.shape[-1]) / _ratios(op, "out_scale", out_scale, x.shape[-1])
    size = ratio.abs()
    if not ((size < 2.0**30) & (size >= 2.0**-31)).all():
        raise _checks.value_error(
            op, name, "not 0, and below 2^30 and from 2^-31 of out_scale up", f"{ratio.tolist()[:8]} of it"
        )
    m, c = fixed_point_of(ratio)
    return tuple(t.to(torch.int32).to(x.device).expand(x.shape[-1]) for t in (m, c))


def fixed_point_of(ratio: torch.Tensor):
    """fixed_point of float64 tensors, of either sign: (m, c) in int64."""
    mantissa, exponent = torch.frexp(ratio.double())
    m = torch.floor(mantissa * 2.0**31 + 0.5).long()
    over = m.abs() >= 2**31
    return torch.where(over, m // 2, m), 31 - exponent.long() - over.long()


def scales(op: str, name: str, x: object, columns: int, dim: str = "C") -> torch.Tensor:
    """A number, or a tensor of one element or of all columns -> [1] or [columns], float64, positive and finite."""
    t = _ratios(op, name, x, columns, dim)
    if not ((t > 0) & (t < math.inf)).all():
        raise _checks.value_error(op, name, "positive and finite", t.tolist()[:8])
    return t


def _ratios(op: str, name: str, x: object, columns: int, dim: str = "C") -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        return torch.tensor([as_scale(op, name, x)], dtype=torch.float64)
    if x.dim() > 1 or x.numel() not in (1, columns):
        raise _checks.value_error(op, name, f"a number, [1] or [{dim}] = [{columns}]", _checks.shape(x))
    return x.detach().double().cpu().reshape(-1)


def fixed_point_option(op: str, ratio: float) -> dict:
    """The options multiplier and shift of a rescaling of all columns."""
    if not 2.0**-31 <= ratio < 2.0**30:
        raise _checks.value_error(op, "out_scale", "such that it divides the result's scale 2^-31 to 2^30 times", ratio)
    m, c = fixed_point(ratio)
    return {"multiplier": m, "shift": c}


def rescaling(op: str, name: str, scale: object, out_name: str, out_scale: object, multiplier: object, shift: object):
    """The options multiplier and shift: from a pair of scales, or as they are given in its place."""
    if (scale is None) != (out_scale is None):
        missing, other = (name, out_name) if scale is None else (out_name, name)
        raise _checks.value_error(op, missing, f"given together with {other}", None)
    if scale is None:
        return {"multiplier": multiplier, "shift": shift}
    if multiplier != 0:
        raise _checks.value_error(op, "multiplier", f"0 where {name} is given", multiplier)
    return fixed_point_option(op, as_scale(op, name, scale) / as_scale(op, out_name, out_scale))
