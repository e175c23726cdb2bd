"""What every operator shares: definition, registration, error wording, autocast, vmap and sharding helpers.

An operator module declares itself once with :func:`define_op`; everything else finds it in :data:`OPS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Sequence

import torch

LIBRARY = torch.library.Library("effvit", "FRAGMENT")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT32_LIMIT = 2.0**128 - 2.0**103  # from here on a number rounds to infinity
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


@dataclasses.dataclass(frozen=True)
class Op:
    """One operator: `torch.ops.effvit.<name>` and how it was declared."""

    name: str
    schema: str  # without the namespace
    reference: Callable  # the op in readable PyTorch, called with the op's own arguments
    validate: Callable  # raises TypeError / ValueError on bad arguments
    fake: Callable  # output tensors from input tensors, without computing
    backward_of: str | None = None  # the forward op that this one differentiates
    options: dict[str, str] = dataclasses.field(default_factory=dict)  # keyword arguments: name -> type in the schema


OPS: dict[str, Op] = {}


def _as_contiguous(x: object) -> object:
    """A dense tensor's metadata without its strides; anything else as it is.

    A compiler traces the op a second time on the strides that it plans for the tensors of its graph (inductor: maps
    channels last), and yet calls it with those of the program, as the tag needs_exact_strides asks.
    """
    return x.new_empty(x.shape) if isinstance(x, torch.Tensor) and x.layout == torch.strided else x


def define_op(
    name: str, schema: str, *, reference: Callable, validate: Callable, fake: Callable, backward_of: str | None = None
) -> Op:
    """Define `effvit::<name>` with a fake kernel, and its reference as the kernel of every device without a better one.

    Validation runs in the reference's and the fake's way too, so that a direct `torch.ops.effvit` call with bad input
    raises before any work; compiled libraries check again in C++.
    """
    keywords = torch._C.parse_schema(f"effvit::{schema}").arguments
    options = {a.name: a.real_type.annotation_str for a in keywords if a.kwarg_only}
    op = Op(name, schema, reference, validate, fake, backward_of, options)
    LIBRARY.define(schema, tags=_TAGS)

    @functools.wraps(reference)
    def checked_reference(*args, **kwargs):
        validate(*args, **kwargs)
        return reference(*args, **kwargs)

    @functools.wraps(fake)
    def checked_fake(*args, **kwargs):
        validate(*map(_as_contiguous, args), **kwargs)
        return fake(*args, **kwargs)

    LIBRARY.impl(name, checked_reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"effvit::{name}", checked_fake, lib=LIBRARY)
    OPS[name] = op
    if backward_of is not None:  # its dtypes are those of the forward; products inside its reference stay in float32
        register_autocast(name, lambda dtype, *tensors: tensors)
    return op


# ---- errors: `effvit::<op>: <argument> must be <expected>, got <given>` -------------------------------------------


def value_error(op: str, name: str, expected: str, given: object) -> ValueError:
    return ValueError(f"effvit::{op}: {name} must be {expected}, got {given}")


def type_error(op: str, name: str, expected: str, given: object) -> TypeError:
    return TypeError(f"effvit::{op}: {name} must be {expected}, got {given}")


def shape(t: torch.Tensor) -> str:
    return "[" + ", ".join(str(s) for s in t.shape) + "]"


def check_tensor(op: str, name: str, t: object) -> None:
    if not isinstance(t, torch.Tensor):
        raise type_error(op, name, "a torch.Tensor", type(t).__name__)
    if t.layout != torch.strided:
        raise type_error(op, name, "a dense (strided) tensor", t.layout)


def check_float(op: str, name: str, t: torch.Tensor, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
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


def check_shape(op: str, name: str, t: torch.Tensor, dims: str, expected: Sequence[int]) -> None:
    if len(t.shape) != len(expected) or any(a != b for a, b in zip(t.shape, expected, strict=True)):
        raise value_error(op, name, f"{dims} = [{', '.join(str(e) for e in expected)}]", shape(t))


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


def as_pair(op: str, name: str, x: object, low: int) -> list[int]:
    """An int or two ints, each at least `low` -> a list of two."""
    if type(x) is int:
        pair = [x, x]
    else:
        pair = [x, x] if is_int(x) else list(x) if isinstance(x, (tuple, list, torch.Size)) else [x]
        if not all(is_int(i) for i in pair):
            raise type_error(op, name, "an int or 2 integers", repr(x))
        if len(pair) != 2:
            raise value_error(op, name, "an int or 2 integers", repr(x))
        pair = [int(i) for i in pair]  # a SymInt is specialised: the geometry is part of the program
    if not (low <= pair[0] <= 1 << 15 and low <= pair[1] <= 1 << 15):
        raise value_error(op, name, f"between {low} and {1 << 15}", pair)
    return pair


_TAKEN_AS = {
    "bool": (bool,),
    "int": (int,),
    "float": (float,),
    "Optional[float]": (float, type(None)),
    "List[int]": (list,),
}


def _takes(op: str, options: dict) -> bool:
    """Whether every option has the Python type that the op's schema names; torch itself would be more lenient."""
    types = OPS[op].options
    return all(
        type(x) in _TAKEN_AS[types[name]] and (type(x) is not list or all(type(i) is int for i in x))
        for name, x in options.items()
    )


def call_or_explain(op: str, call: Callable, validate: Callable, options: dict) -> object:
    """``call(**options)``; where that fails, what ``validate(**options)`` has to say of the arguments of `op`.

    Every kernel checks its arguments itself. To check them here as well, before each eager call, would take longer than
    a small kernel does. Options of other than the schema's types are validated first: validation converts them.
    """
    if torch.compiler.is_compiling() or not _takes(op, options):
        return call(**validate(**options))
    try:
        return call(**options)
    except Exception as error:
        failure = error
    validate(**options)  # raises in this project's words, unless the fault lies elsewhere
    raise failure


# ---- dispatcher helpers ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def autograd_below_autograd():
    """Record gradients inside a kernel, where the dispatcher has already left autograd behind.

    The reference of a backward op is the derivative of the reference of its forward op.
    """
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "AutogradMeta", "ADInplaceOrView"):
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set() - keys
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def register_autocast(name: str, cast: Callable) -> None:
    """Run the op below autocast with `cast(dtype, *args)` applied to its positional arguments."""
    overload = getattr(torch.ops.effvit, name).default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*args, _device_type=device_type, _key=key, **kwargs):
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return overload(*cast(torch.get_autocast_dtype(_device_type), *args), **kwargs)

        LIBRARY.impl(name, kernel, key)


def vmap_by_folding(name: str, foldable: Sequence[int], unless_given: Sequence[int] = ()) -> None:
    """vmap rule: fold the mapped dimension into dim 0 when only `foldable` positions carry it, else loop over it.

    It loops as well when an argument at one of the positions `unless_given` is given.
    Every output of the op must have the folded dimension first, as windowed, linear and gated attention do.
    """
    overload = getattr(torch.ops.effvit, name).default

    def rule(info, in_dims, *args, **kwargs):
        mapped = [i for i, (d, a) in enumerate(zip(in_dims, args, strict=True)) if d is not None and a is not None]
        n = info.batch_size
        alone = any(i < len(args) and args[i] is not None for i in unless_given)
        if n > 0 and not alone and all(i in foldable for i in mapped):
            moved = list(args)
            for i in foldable:
                if i < len(args) and args[i] is not None:
                    a = args[i].movedim(in_dims[i], 0) if in_dims[i] is not None else args[i].expand(n, *args[i].shape)
                    moved[i] = a.reshape(n * a.shape[1], *a.shape[2:])
            outs = overload(*moved, **kwargs)
            if isinstance(outs, torch.Tensor):
                return outs.reshape(n, outs.shape[0] // n, *outs.shape[1:]), 0
            return tuple(o.reshape(n, o.shape[0] // n, *o.shape[1:]) for o in outs), (0,) * len(outs)
        rows = []
        for j in range(n):
            rows.append(
                overload(*(a.select(in_dims[i], j) if i in mapped else a for i, a in enumerate(args)), **kwargs)
            )
        if isinstance(rows[0], torch.Tensor):
            return torch.stack(rows), 0
        outs = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return outs, (0,) * len(outs)

    torch.library.register_vmap(f"effvit::{name}", rule, lib=LIBRARY)


def shapes_depend_on(overload, *names: str) -> None:
    """Tell DTensor which keyword arguments change the outputs' shapes: it caches what it knows of a call.

    `register_sharding` keys that cache by tensors and int keyword arguments only; a bool must be named.
    """
    from torch.distributed.tensor import DTensor

    info = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[overload]
    info.static_kwargkey = sorted({*(info.static_kwargkey or ()), *names})
