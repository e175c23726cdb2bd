"""Checks of arguments, and the wording of errors: `effvit::<op>: <argument> must be <expected>, got <given>`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBER_DTYPES = (*FLOAT_DTYPES, torch.int8)
INTEGER_DTYPES = (torch.int32, torch.int16, torch.int8, torch.uint8)
KINDS = {"float": FLOAT_DTYPES, "number": NUMBER_DTYPES, "integer": INTEGER_DTYPES}  # marks of declarations
_FLOAT32_LIMIT = 2.0**128 - 2.0**103  # from here on a number rounds to infinity


def value_error(op: str, name: str, expected: str, given: object) -> ValueError:
    return ValueError(f"effvit::{op}: {name} must be {expected}, got {given}")


def type_error(op: str, name: str, expected: str, given: object) -> TypeError:
    return TypeError(f"effvit::{op}: {name} must be {expected}, got {given}")


def shape(t: torch.Tensor) -> str:
    return "[" + ", ".join(str(s) for s in t.shape) + "]"


# ---- tensors -------------------------------------------------------------------------------------------------------


def check_tensor(op: str, name: str, t: object) -> None:
    if not isinstance(t, torch.Tensor):
        raise type_error(op, name, "a torch.Tensor", type(t).__name__)
    if t.is_nested or t.layout != torch.strided:
        raise type_error(op, name, "a dense (strided) tensor", "nested" if t.is_nested else t.layout)


def check_dtype(op: str, name: str, t: torch.Tensor, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    if t.dtype not in dtypes:
        names = [str(d).removeprefix("torch.") for d in dtypes]
        raise type_error(op, name, f"{', '.join(names[:-1])} or {names[-1]}", t.dtype)


def check_like(op: str, name: str, t: torch.Tensor, like_name: str, like: torch.Tensor, dtype: bool = True) -> None:
    """`t` lives where `like` lives and, unless told otherwise, has its dtype."""
    if dtype and t.dtype != like.dtype:
        raise type_error(op, name, f"{like.dtype} like {like_name}", t.dtype)
    if t.device != like.device:
        raise value_error(op, name, f"on {like.device} like {like_name}", t.device)


def check_last_stride(op: str, name: str, t: torch.Tensor) -> None:
    if t.numel() and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise value_error(op, name, "a tensor whose last stride is 1", f"strides {tuple(t.stride())}")


def check_whole(op: str, name: str, t: torch.Tensor) -> None:
    if not t.is_contiguous():
        raise value_error(op, name, "contiguous as the forward returned it", f"strides {tuple(t.stride())}")


def given_together(op: str, tensors: dict, a: str, b: str) -> None:
    if (tensors[a] is None) != (tensors[b] is None):
        missing, other = (a, b) if tensors[a] is None else (b, a)
        raise value_error(op, missing, f"given together with {other}", None)


def check_scales(op: str, tensors: dict, *names: str, of_rows: str | None = None) -> None:
    """Positive and finite, where the values can be read.

    of_rows: the one that may have a scale for each row, which is not finite where the row is not.
    """
    for name in names:
        t = tensors[name]
        if t is None or not has_readable_values(t):
            continue
        own = name == of_rows and t.stride(0) != 0
        wrong = t <= 0 if own else ~((t > 0) & (t < math.inf))  # a NaN is neither
        if wrong.any():
            where = wrong.nonzero()[0].tolist()
            at = t[tuple(where)].item()
            raise value_error(op, name, "positive and finite", f"{at} at {where}")


def has_readable_values(t: torch.Tensor, wait: bool = False) -> bool:
    """Whether a tensor's values are there: not while tracing, nor, unless asked to wait for them, on a GPU."""
    return (
        type(t) in (torch.Tensor, torch.nn.Parameter)
        and (t.device.type == "cpu" or (wait and t.device.type != "meta"))
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and not is_in_torch_dispatch_mode()  # a tracer's, perhaps
    )


# ---- numbers -------------------------------------------------------------------------------------------------------


def is_int(x: object) -> bool:
    return type(x) is int or (isinstance(x, (numbers.Integral, torch.SymInt)) and not isinstance(x, bool))


def as_finite(op: str, name: str, x: object) -> float:
    """A finite real number -> a float."""
    if type(x) is not float:
        if isinstance(x, bool) or not isinstance(x, (numbers.Real, torch.SymFloat, torch.SymInt)):
            raise type_error(op, name, "a real number", type(x).__name__)
        x = float(x)  # a SymFloat is specialised, as in as_pair
    if not -math.inf < x < math.inf:  # a comparison can be traced, math.isfinite cannot
        raise value_error(op, name, "finite", x)
    if not -_FLOAT32_LIMIT < x < _FLOAT32_LIMIT:
        raise value_error(op, name, "finite in float32", x)
    return x


def as_positive(op: str, name: str, x: object) -> float:
    """A finite real number that is positive, also in float32 -> a float."""
    x = as_finite(op, name, x)
    if x <= 2.0**-150:  # rounds to 0
        raise value_error(op, name, "positive", x)
    return x


def as_int(op: str, name: str, x: object, bounds: tuple[int, int] | None) -> int:
    if not is_int(x):
        raise type_error(op, name, "an int", repr(x))
    if bounds is not None and not bounds[0] <= x <= bounds[1]:
        raise value_error(op, name, f"between {bounds[0]} and {bounds[1]}", x)
    return int(x)


def as_pair(op: str, name: str, x: object, bounds: tuple[int, int]) -> list[int]:
    """An int or two ints within bounds -> a list of two."""
    if type(x) is int:
        pair = [x, x]
    else:
        pair = [x, x] if is_int(x) else list(x) if isinstance(x, (tuple, list, torch.Size)) else [x]
        if not all(is_int(i) for i in pair):
            raise type_error(op, name, "an int or 2 integers", repr(x))
        if len(pair) != 2:
            raise value_error(op, name, "an int or 2 integers", repr(x))
        pair = [int(i) for i in pair]  # a SymInt is specialised: the geometry is part of the program
    low, high = bounds
    if not (low <= pair[0] <= high and low <= pair[1] <= high):
        raise value_error(op, name, f"between {low} and {high}", pair)
    return pair


def as_bool(op: str, name: str, x: object) -> bool:
    if not isinstance(x, bool):
        raise type_error(op, name, "a bool", type(x).__name__)
    return x


def index_of(op: str, name: str, x: object, names: Sequence[str]) -> int:
    """One of some words -> its index, which is what a schema holds."""
    if not isinstance(x, str):
        raise type_error(op, name, f"one of {', '.join(names)}", type(x).__name__)
    if x not in names:
        raise value_error(op, name, f"one of {', '.join(names)}", repr(x))
    return names.index(x)


def _traced(x: object) -> object:
    return x.item() if isinstance(x, torch.Tensor) and x.dim() == 0 else x


def as_option(op: str, option, x: object) -> object:
    """What an option of a declaration (ops/_declaration.py) takes -> the type that its schema names."""
    if torch.jit.is_tracing():  # sizes are tensors there: what is computed from them becomes part of the trace
        x = [_traced(i) for i in x] if isinstance(x, (tuple, list)) else _traced(x)
    if option.type == "bool":
        return as_bool(op, option.name, x)
    if option.type == "int":
        return as_int(op, option.name, x, option.range)
    if option.type == "int[2]":
        return as_pair(op, option.name, x, option.range)
    if x is None and option.type == "float?":
        return None
    x = (as_positive if option.constraint == "> 0" else as_finite)(op, option.name, x)
    if option.constraint == ">= 0" and x < 0:
        raise value_error(op, option.name, "at least 0", x)
    return x
