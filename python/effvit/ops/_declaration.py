"""The text that declares an operator, and what it means: tensors by named dims, options, outputs.

csrc/common/declaration.h reads the same text; tests/test_abi.py compares the two::

    name(TENSORS; OPTIONS) -> OUTPUTS

    tensor   NAME[?]: DIM ... [| MARK ...]      ? optional
    DIM      NAME, NAME' (another value, shown without the prime), an integer, or an expression such as 2*wh-1+2*halo_h;
             an expression NAME+INT gives NAME its value where nothing else has. A first DIM of ... stands for any
             number of dims, the same for every tensor that has it
    MARK     float: any of the three float dtypes; number: these or int8; integer: int32, int16, int8 or uint8;
             float32, int8, ...: that dtype; out_dtype (of an output): what the option of that name says, an index into
             OUT_DTYPES; else that of the first tensor
             strided: any strides; packed: any, a kernel gets a contiguous copy; whole: contiguous, as the forward
             returned it; else any with a last stride of 1
    option   NAME: TYPE [CONSTRAINT] [= DEFAULT]
    TYPE     float, float?, int, bool, int[2](a, b): two integers with names for expressions
    CONSTRAINT  > 0, >= 0, or `in LOW..HIGH`

The first tensor is the first required one that is no gradient; dtype and device of the others are compared with it. The
first tensor, and every required one that is neither a gradient nor marked whole, is a main one: from these the dims get
their values; all other tensors must have them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re

LAYOUTS = ("strided", "packed", "whole")
OUT_DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint8", "int16")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a declaration."""

    name: str
    optional: bool
    dims: tuple[str, ...]
    dtype: str = ""  # "": the first tensor's; "float", "number", "integer": any of these; "out_dtype"; else a name
    layout: str = ""  # "": last stride 1

    @property
    def is_gradient(self) -> bool:
        return self.name.startswith("grad_")

    @property
    def is_float(self) -> bool:
        return self.dtype in ("", "float") or self.dtype.startswith("float")

    @functools.cached_property
    def shown(self) -> str:
        """The dims as messages show them."""
        return "[" + ", ".join(show(d) for d in self.dims) + "]"

    @property
    def text(self) -> str:
        marks = " ".join(filter(None, (self.dtype, self.layout)))
        return f"{self.name}{'?' * self.optional}: {' '.join(self.dims)}" + (f" | {marks}" if marks else "")


@dataclasses.dataclass(frozen=True)
class Option:
    """One keyword argument of a declaration."""

    name: str
    type: str  # float, float?, int, bool, int[2]
    elements: tuple[str, ...] = ()
    constraint: str = ""
    default: str | None = None

    @functools.cached_property
    def range(self) -> tuple[int, int] | None:
        found = re.fullmatch(r"in (-?\d+)\.\.(-?\d+)", self.constraint)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def text(self) -> str:
        elements = f"({', '.join(self.elements)})" if self.elements else ""
        default = "" if self.default is None else f" = {self.default}"
        return f"{self.name}: {self.type}{elements}" + (f" {self.constraint}" if self.constraint else "") + default

    @property
    def schema(self) -> str:
        return f"{self.type} {self.name}" + ("" if self.default is None else f"={self.default}")


@dataclasses.dataclass(frozen=True)
class Declaration:
    """An operator: its tensors, options and outputs."""

    name: str
    tensors: tuple[Tensor, ...]
    options: tuple[Option, ...]
    outputs: tuple[Tensor, ...]

    @functools.cached_property
    def first(self) -> Tensor:
        return next(t for t in self.tensors if not t.optional and not t.is_gradient)

    @functools.cached_property
    def main(self) -> tuple[Tensor, ...]:
        return tuple(
            t
            for t in self.tensors
            if t is self.first or not (t.optional or t.is_gradient or t.layout == "whole")
        )  # fmt: skip

    @functools.cached_property
    def others(self) -> tuple[Tensor, ...]:
        return tuple(t for t in self.tensors if t not in self.main)

    def output(self, name: str) -> Tensor:
        return next(t for t in self.outputs if t.name == name)

    @property
    def text(self) -> str:
        arguments = ", ".join(t.text for t in self.tensors)
        options = "; " + ", ".join(o.text for o in self.options) if self.options else ""
        return f"{self.name}({arguments}{options}) -> {', '.join(t.text for t in self.outputs)}"

    @property
    def schema(self) -> str:
        """The schema of torch.library. An optional tensor can be left out where no required one follows."""
        last = max(i for i, t in enumerate(self.tensors) if not t.optional)
        arguments = [
            f"Tensor{'?' * t.optional} {t.name}" + ("=None" if t.optional and i > last else "")
            for i, t in enumerate(self.tensors)
        ]
        if self.options:
            arguments += ["*", *(o.schema for o in self.options)]
        outputs = [f"Tensor {t.name}" for t in self.outputs]
        returned = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
        return f"{self.name}({', '.join(arguments)}) -> {returned}"

    def dim_of(self, tensor: Tensor, group: tuple[str, ...]) -> int | None:
        """Which dim of a tensor one of these names is, if any; the first of all for `...`."""
        return next((i for i, d in enumerate(tensor.dims) if d.rstrip("'") in group), None)


def split(dims: tuple[str, ...], shape) -> tuple | None:
    """[(dim, size)] of a tensor's shape, with all of `...` as one size; None where the ranks differ."""
    if dims[:1] != ("...",):
        return list(zip(dims, shape, strict=True)) if len(dims) == len(shape) else None
    leading = len(shape) - len(dims) + 1
    if leading < 0 or len(shape) > 6:
        return None
    return [("...", tuple(shape[:leading])), *zip(dims[1:], shape[leading:], strict=True)]


def join(dims: tuple[str, ...], values: dict) -> list:
    """The shape that these dims are."""
    sizes = [value(d, values) for d in dims]
    return [*sizes[0], *sizes[1:]] if dims[:1] == ("...",) else sizes


def show(dim: str) -> str:
    solved = re.fullmatch(r"([A-Za-z_]\w*)\+(\d+)", dim)
    return f"{solved[1]} + {solved[2]}" if solved else dim.rstrip("'")


def names_in(dim: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*'?", dim))


@functools.cache
def _compiled(dim: str):
    """An expression as code; `'` cannot stand in a name of Python's."""
    source = dim.replace("'", "_prime")
    for node in ast.walk(ast.parse(source, mode="eval")):
        allowed = (ast.Expression, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Name, ast.Constant, ast.Load)
        if not isinstance(node, allowed):
            raise ValueError(f"effvit: a dim must be a name, an integer or a sum of products of these, got {dim}")
    return compile(source, "<dim>", "eval")


def value(dim: str, dims: dict):
    """What a dim of a declaration is, with values for the names in it."""
    if dim in dims:
        return dims[dim]
    if dim.isdigit():
        return int(dim)
    return eval(_compiled(dim), {"__builtins__": {}}, {n.replace("'", "_prime"): v for n, v in dims.items()})


def solve(dim: str, size, dims: dict) -> bool:
    """Gives the name in `dim` the value that makes it `size`; False where it has one already."""
    if dim == "..." or re.fullmatch(r"[A-Za-z_]\w*'?", dim):
        name, rest = dim, 0
    elif found := re.fullmatch(r"([A-Za-z_]\w*)\+(\d+)", dim):
        name, rest = found[1], int(found[2])
    else:
        return False
    if name in dims:
        return False
    dims[name] = size - rest if rest else size
    return True


# ---- reading -------------------------------------------------------------------------------------------------------


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([") - (c in ")]")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in (*parts, text[start:]) if p.strip()]


def _tensor(text: str) -> Tensor:
    found = re.fullmatch(r"(\w+)(\??):\s*([^|]*?)\s*(?:\|\s*(.*))?", text)
    if not found:
        raise ValueError(f"effvit: a tensor must be declared as `name: dims | marks`, got {text!r}")
    marks = (found[4] or "").split()
    layouts = [m for m in marks if m in LAYOUTS]
    dtypes = [m for m in marks if m not in LAYOUTS]
    if len(layouts) > 1 or len(dtypes) > 1:
        raise ValueError(f"effvit: a tensor must have one dtype and one layout, got {text!r}")
    return Tensor(found[1], bool(found[2]), tuple(found[3].split()), "".join(dtypes), "".join(layouts))


def _option(text: str) -> Option:
    found = re.fullmatch(
        r"(\w+):\s*(float\??|int\[2\]|int|bool)\s*(?:\(([^)]*)\))?\s*(> 0|>= 0|in -?\d+\.\.-?\d+)?\s*(?:=\s*(.*))?",
        text,
    )
    if not found:
        raise ValueError(f"effvit: an option must be declared as `name: type constraint = default`, got {text!r}")
    elements = tuple(_split(found[3] or ""))
    return Option(found[1], found[2], elements, found[4] or "", found[5])


def declare(name: str, tensors: str, options: str = "") -> Declaration:
    """`tensors` is "TENSORS -> OUTPUTS"."""
    inputs, outputs = (" ".join(part.split()) for part in tensors.split("->"))
    return Declaration(
        name,
        tuple(map(_tensor, _split(inputs))),
        tuple(map(_option, _split(" ".join(options.split())))),
        tuple(map(_tensor, _split(outputs))),
    )


def backward_of(
    forward: Declaration, saves: tuple[str, ...], inputs: bool = True, packs: tuple[str, ...] = ()
) -> Declaration:
    """The declaration of the op that differentiates `forward`, from the gradients of its outputs, its inputs (unless
    told otherwise) and the outputs named in `saves`, to the gradients of its inputs.

    The first output's gradient is always given, those of the others may be absent. Gradients of the inputs in `packs`
    are one tensor on demand, side by side in its last dim: the first then has the shape of all, the others are empty.
    """
    gradients = [
        dataclasses.replace(t, name=f"grad_{t.name}", optional=i > 0, layout="packed" if t.dtype else "")
        for i, t in enumerate(forward.outputs)
    ]
    saved = [dataclasses.replace(t, layout="whole") for t in forward.outputs if t.name in saves]
    required = [t for t in forward.tensors if not t.optional] if inputs else []
    optional = [t for t in forward.tensors if t.optional] if inputs else []
    outputs = [
        dataclasses.replace(t, name=f"d{t.name}", layout="") for t in forward.tensors if t.is_float
    ]  # fmt: skip
    for i, t in enumerate(outputs):
        if t.name[1:] in packs:
            first = t.name[1:] == packs[0]
            dims = (*t.dims[:-2], f"{t.dims[-2]}'", f"{t.dims[-1]}'") if first else (f"{t.dims[0]}'", *t.dims[1:])
            outputs[i] = dataclasses.replace(t, dims=dims)
    tensors = (*gradients, *required, *saved, *optional)
    options = forward.options if inputs else ()
    if packs:
        options = (*options, Option("packed", "bool", default="False"))
    return Declaration(f"{forward.name}_backward", tensors, options, tuple(outputs))
