"""`op(...)`: an operator from its declaration.

Schema, validation, fake kernel, reference kernel, autograd, autocast, vmap and DTensor rules of
`torch.ops.effvit.<name>` and of the op that differentiates it follow from the declaration; an op's own file has the
declaration, what only this op checks, and the public function. Everything else finds the ops in :data:`OPS`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from . import _checks, _dispatcher, _transforms
from ._declaration import OUT_DTYPES, Declaration, Tensor, backward_of, declare, join, names_in, solve, split, value

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_TAKEN_AS = {
    "bool": (bool,), "int": (int,), "float": (float,), "float?": (float, type(None)), "int[2]": (list,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cost:
    """Floating-point operations and the least bytes that must move between memory and the chip."""

    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """One operator, forward or backward. Calling it is calling `torch.ops.effvit.<name>`, with errors explained."""

    declaration: Declaration
    reference: Callable  # in readable PyTorch, called with the op's own arguments, which it checks
    definition: Callable  # what reference computes in float32: differentiable, any float dtype
    limits: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    shape: str = ""  # what messages say of the first tensor's shape, instead of its dims
    derive: Callable | None = None
    check: Callable | None = None
    empty: tuple[str, ...] = ()
    backward_of: str | None = None  # the forward op that this one differentiates
    flops: Callable | None = None
    shards: tuple[str, ...] = ()
    autocast: bool = True
    through: Callable | None = None  # differentiated in place of definition, which rounds

    @property
    def name(self) -> str:
        return self.declaration.name

    @property
    def schema(self) -> str:
        return self.declaration.schema

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.declaration.tensors)

    def given(self, args: Sequence) -> dict[str, object]:
        """{name: argument}, None for those left out."""
        return dict(zip(self.names, (*args, *(None,) * (len(self.names) - len(args))), strict=True))

    def is_empty(self, dims: Mapping) -> bool:
        """Nothing to compute: outputs without elements, gradients that are zero."""
        return any(0 in dims[d] if d == "..." else dims[d] == 0 for d in self.empty)

    def named(self, name: str) -> Op:
        """This op under another name in messages, for a function that takes the same arguments."""
        other = dataclasses.replace(self, declaration=dataclasses.replace(self.declaration, name=name))
        other.__dict__.update(overload=self.overload, pairs=self.pairs)
        return other

    # ---- validation -----------------------------------------------------------------------------------------------

    def validate(self, *args, **options) -> dict:
        """Raise on anything the op does not take; return all options as its schema has them."""
        return self.bind(args, options)[1]

    def bind(self, args: Sequence, options: Mapping) -> tuple[dict, dict]:
        """(values of the dims, all options as the schema has them) of a valid call."""
        op, d, tensors = self.name, self.declaration, self.given(args)
        for t in d.main:
            _checks.check_tensor(op, t.name, tensors[t.name])
        dims: dict = {}
        for t in d.main:
            self._check_main(t, tensors, dims)
        first = tensors[d.first.name]
        for t in d.main:
            self._check_kind(t, tensors[t.name], first)
            for dim, (low, high, predicate) in self.limits.items():
                if dim.split(".")[0] == t.name and not low <= dims[dim.split(".")[1]] <= high:
                    raise ValueError(f"effvit::{op}: {t.name} must {predicate}, got {_checks.shape(tensors[t.name])}")
        unknown = options.keys() - {o.name for o in d.options}
        if unknown:
            raise TypeError(f"effvit::{op}: got an unexpected keyword argument {min(unknown)!r}")
        values = {}
        for o in d.options:
            if o.name not in options and o.default is None:
                raise TypeError(f"effvit::{op}: {o.name} must be given")
            given = options[o.name] if o.name in options else self.defaults[o.name]
            values[o.name] = x = _checks.as_option(op, o, given)
            dims.update(zip(o.elements, x if o.elements else (), strict=True))
        if self.derive is not None:
            self.derive(op, dims, values, tensors)
        for t in d.others:
            if tensors[t.name] is None and t.optional:
                continue
            _checks.check_tensor(op, t.name, tensors[t.name])
            self._check_other(t, tensors[t.name], first, dims)
        if self.check is not None:
            self.check(op, dims, values, tensors)
        return dims, values

    def complete(self, options: Mapping) -> dict:
        """Options as the schema has them, defaults included."""
        given = self.defaults | dict(options)
        return {o.name: _checks.as_option(self.name, o, given[o.name]) for o in self.declaration.options}

    @functools.cached_property
    def defaults(self) -> dict:
        arguments = self.overload._schema.arguments
        return {a.name: a.default_value for a in arguments if a.kwarg_only and a.has_default_value()}

    def _check_main(self, t: Tensor, tensors: dict, dims: dict) -> None:
        """Rank and dims, in the words `[B, M, H, D] like q [1, 6, 2, 8]`; the first tensor's dtype."""
        x, main, first = tensors[t.name], self.declaration.main, t is self.declaration.first
        sizes = split(t.dims, x.shape)
        fits = sizes is not None
        for dim, size in sizes or ():
            fits = fits and (solve(dim, size, dims) or value(dim, dims) == size)
        if not fits:
            expected = self.shape or t.shown
            if not first:
                like = max(main[: main.index(t)], key=lambda m: len({*m.dims} & {*t.dims}))
                expected = f"{t.shown} like {like.name} {_checks.shape(tensors[like.name])}"
            raise _checks.value_error(self.name, t.name, expected, _checks.shape(x))
        if first and not t.dtype:
            _checks.check_dtype(self.name, t.name, x)

    def _check_kind(self, t: Tensor, x: torch.Tensor, first: torch.Tensor) -> None:
        """dtype, device and layout."""
        op, name = self.name, self.declaration.first.name
        if t.dtype in _checks.KINDS:
            _checks.check_dtype(op, t.name, x, _checks.KINDS[t.dtype])
        elif t.dtype and x.dtype != getattr(torch, t.dtype):
            raise _checks.type_error(op, t.name, getattr(torch, t.dtype), x.dtype)
        _checks.check_like(op, t.name, x, name, first, dtype=not t.dtype)
        if t.layout == "whole":
            _checks.check_whole(op, t.name, x)
        elif t.layout == "":
            _checks.check_last_stride(op, t.name, x)

    def _check_other(self, t: Tensor, x: torch.Tensor, first: torch.Tensor, dims: dict) -> None:
        sizes = split(t.dims, x.shape)
        if sizes is None and any(n not in dims for dim in t.dims for n in names_in(dim)):
            raise _checks.value_error(self.name, t.name, t.shown, _checks.shape(x))
        for dim, size in sizes or ():
            if solve(dim, size, dims) and any(dims[n] < 0 for n in names_in(dim)):
                raise _checks.value_error(self.name, t.name, t.shown, _checks.shape(x))
        expected = join(t.dims, dims)
        if len(expected) != x.dim() or any(a != b for a, b in zip(x.shape, expected, strict=True)):
            raise _checks.value_error(
                self.name, t.name, f"{t.shown} = [{', '.join(str(e) for e in expected)}]", _checks.shape(x)
            )
        self._check_kind(t, x, first)

    # ---- calls -----------------------------------------------------------------------------------------------------

    def __call__(self, *tensors, **options):
        """`torch.ops.effvit.<name>`; where that fails, what validation has to say of the arguments.

        Every kernel checks its arguments itself. To check them here as well, before each eager call, would take longer
        than a small kernel does. Options of other than the schema's types are validated first: that converts them.
        """
        for name in self.pairs:
            if name in options:
                options[name] = _as_list(options[name])
        exporting = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if exporting and torch.onnx.is_in_onnx_export():  # ONNX has no operators of effvit's
            return _returned(self, _transforms.compose(self, tensors, self.complete(options)))
        if torch.compiler.is_compiling():
            return self.overload(*tensors, **options)  # the fake kernel validates
        if not self._takes(options):
            return self.overload(*tensors, **self.validate(*tensors, **options))
        try:
            return self.overload(*tensors, **options)
        except Exception as error:
            failure = error
        self.validate(*tensors, **options)  # raises in this project's words, unless the fault lies elsewhere
        raise failure

    def _takes(self, options: dict) -> bool:
        """Whether every option has the Python type that the schema names; torch itself would be more lenient."""
        types = {o.name: _TAKEN_AS[o.type] for o in self.declaration.options}
        return all(
            type(x) in types.get(name, ()) and (type(x) is not list or all(type(i) is int for i in x))
            for name, x in options.items()
        )

    def outputs(self, args: Sequence, options: Mapping, make: Callable) -> tuple:
        """`make(output, shape, dtype)` for every output; the gradient of an argument that is not given is empty."""
        dims, values = self.bind(args, options)
        tensors = self.given(args)
        made = []
        for t in self.declaration.outputs:
            source = tensors.get(t.name[1:]) if self.backward_of else None
            size = [0] if t.optional and source is None else join(t.dims, dims)
            made.append(make(t, size, self.dtype_of(t, tensors, values)))
        return tuple(made)

    def dtype_of(self, output: Tensor, tensors: Mapping, options: Mapping) -> torch.dtype:
        """That of the first tensor, unless declared; of a gradient, that of what it is the gradient of."""
        if output.dtype == "out_dtype":
            return getattr(torch, OUT_DTYPES[options["out_dtype"]])
        source = tensors.get(output.name[1:]) if self.backward_of else None
        if source is None and output.dtype:
            return torch.float32 if output.dtype == "float" else getattr(torch, output.dtype)
        return (tensors[self.declaration.first.name] if source is None else source).dtype

    def cost(self, args: Sequence, options: Mapping, backward: bool = False) -> Cost:
        """Every tensor given is read once, every output written once; `backward`: of the op that differentiates this
        one, called with the results of this call and the gradient of the first.
        """
        dims, values = self.bind(args, options)
        made = self.outputs(args, options, lambda t, size, dtype: (math.prod(size) * dtype.itemsize, t.name))
        inputs = [(t, x.numel() * x.element_size()) for t, x in zip(self.declaration.tensors, args, strict=False)
                  if x is not None]  # fmt: skip
        read, written = sum(size for _, size in inputs), sum(size for size, _ in made)
        if not backward:
            return Cost(self.flops(dims, values)[self.backward_of is not None], read + written)
        gradient = OPS[f"{self.name}_backward"]
        sizes = {t.name: size for t, size in inputs} | {name: size for size, name in made}
        sizes |= {f"d{t.name}": size for t, size in inputs if t.is_float} | {f"grad_{made[0][1]}": made[0][0]}
        touched = (*gradient.names, *(t.name for t in gradient.declaration.outputs))
        return Cost(self.flops(dims, values)[1], sum(sizes.get(n, 0) for n in touched))


OPS: dict[str, Op] = {}


def _as_list(x):
    if type(x) is int:
        return [x, x]
    return list(x) if type(x) is tuple and all(type(i) is int for i in x) else x


def _returned(op: Op, results: Iterable):
    results = tuple(results)
    return results[0] if len(op.declaration.outputs) == 1 else results


def _owned(args: Sequence, results: Iterable, dtypes: Iterable) -> tuple:
    """Results of a reference as an op returns them: contiguous, of its dtypes, in memory of their own.

    The gradient of a sum is that of its terms, so autograd hands out one tensor several times.
    """
    made, taken = [], [t for t in args if isinstance(t, torch.Tensor)]
    for result, dtype in zip(results, dtypes, strict=True):
        x = result.detach().to(dtype).contiguous()
        made.append(x.clone() if any(torch._C._is_alias_of(x, t) for t in (*taken, *made)) else x)
    return tuple(made)


def _as_contiguous(x: object) -> object:
    """A dense tensor's metadata without its strides; anything else as it is.

    A compiler traces the op a second time on the strides that it plans for the tensors of its graph (inductor: maps
    channels last), and yet calls it with those of the program, as the tag needs_exact_strides asks.
    """
    return x.new_empty(x.shape) if isinstance(x, torch.Tensor) and x.layout == torch.strided else x


# ---- the definition of an op ---------------------------------------------------------------------------------------


def op(
    name: str,
    tensors: str,
    options: str = "",
    *,
    reference: Callable,
    backward: Callable | None = None,
    saves: str | None = "",
    saves_inputs: bool = True,
    limits: Mapping[str, tuple] | None = None,
    shape: str = "",
    derive: Callable | None = None,
    check: Callable | None = None,
    empty: str = "",
    packs: Sequence[str] = (),
    batch: str = "B",
    alone: str = "",
    shards: Sequence[str] = (),
    shape_options: Sequence[str] = (),
    autocast: bool = True,
    flops: Callable | None = None,
    tangent: Callable | None = None,
    through: Callable | None = None,
) -> Op:
    """Define `effvit::<name>` and `effvit::<name>_backward`; returns the former.

    Args:
        tensors, options: the declaration, "TENSORS -> OUTPUTS" and "OPTIONS": see ops/_declaration.py.
        reference: the definition, ``(*tensors, **options)``, differentiable; gets float32 for half precision.
        backward: the definition of the backward op, ``(*its tensors, **options) -> gradients``; None: autograd's
            derivative of `reference`.
        saves: names of the outputs that the backward op reads; None: no backward op, gradients are the definition's.
        saves_inputs: whether it reads the inputs and the options.
        limits: {"q.D": (low, high, "have a head dim between ...")} of the dims of main tensors.
        shape: what messages say of the first tensor's shape, instead of its dims.
        derive: ``(op, dims, options, tensors)`` adds dims that no tensor gives, and checks options against each other.
        check: likewise, after everything else.
        empty: dims of which none may be 0, or there is nothing to compute.
        packs: inputs [B, ..., h, d] whose gradients are written side by side into one tensor where they themselves lie
            side by side in one, as slices of a projection do: the gradient of the projection then costs no copy.
        batch: names of the dims (of equal size) that vmap folds the mapped dim into.
        alone: a tensor that, when given, makes the batch one call: it is then neither folded nor sharded.
        shards: dims that DTensor may shard, each a group of names of equal size; "B N" with `alone` as above. Gradients
            of tensors that lack the dim are partial sums.
        shape_options: options that change the shape of outputs.
        autocast: cast the tensors that have the first one's dtype.
        flops: ``(dims, options) -> (forward, backward)``, floating-point operations; a multiply-add counts 2.
        tangent: forward mode by kernels, ``(op, primals, tangents, results, options) -> tangents of the results``;
            None: by the definition.
        through: of an op without a backward one, what is differentiated in place of `reference`: straight through its
            roundings.
    """
    forward_declaration = declare(name, tensors, options)
    common = {
        "limits": limits or {}, "shape": shape, "derive": derive, "check": check, "empty": tuple(empty.split()),
        "flops": flops, "shards": tuple(shards), "autocast": autocast,
    }  # fmt: skip

    def run_reference(*args, **kwargs):
        dims, values = forward.bind(args, kwargs)
        if forward.is_empty(dims):
            return fake(forward, *args, **values)
        results = reference(*map(_transforms.float_, forward.given(args).values()), **values)
        outs = results if isinstance(results, tuple) else (results,)
        like = forward.outputs(args, values, lambda t, size, dtype: dtype)
        return _returned(forward, _owned(args, outs, like))

    forward = Op(forward_declaration, run_reference, reference, through=through, **common)
    _define(forward)
    if saves is not None:
        declaration = backward_of(forward_declaration, tuple(saves.split()), saves_inputs, tuple(packs))
        if packs:
            packing = _transforms.Packing([t for t in forward_declaration.tensors if t.name in packs])
            common["derive"] = functools.partial(packing.derive, derive)
        if not saves_inputs:
            common |= {"derive": None, "check": None}
            common["limits"] = {
                f"{saves}{k[len(forward_declaration.first.name) :]}": x for k, x in common["limits"].items()
            }
        derivative = backward or functools.partial(_transforms.derivative, forward, reference)

        def run_backward(*args, **kwargs):
            dims, values = gradient.bind(args, kwargs)
            if gradient.is_empty(dims):
                make = lambda t, size, dtype: args[0].new_zeros(size, dtype=dtype)
                return _returned(gradient, gradient.outputs(args, values, make))
            packed = values.pop("packed", False)
            with _dispatcher.autograd_below_autograd():
                detached = (None if t is None else t.detach() for t in gradient.given(args).values())
                results = _transforms.as_tuple(derivative(*detached, **values))
            if packed:
                results = packing.join(results)
                values["packed"] = True
            like = gradient.outputs(args, values, lambda t, size, dtype: dtype)
            given = (args[0].new_empty(0) if g is None else g for g in results)
            return _returned(gradient, _owned(args, given, like))

        gradient = Op(declaration, run_backward, derivative, backward_of=name, **common)
        _define(gradient)
        function = _transforms.recorder(forward, gradient, saves.split(), saves_inputs, packing if packs else None)
        # Its dtypes are those of the forward; products inside its reference stay in float32.
        _register_transforms(gradient, _transforms.recorder_of_definition(gradient), None, batch, alone, False)
    else:
        function = _transforms.recorder_of_definition(forward)
    _register_transforms(forward, function, tangent, batch, alone, autocast)
    if shards and torch.distributed.is_available():
        _register_sharding(forward, shards, batch.split(), alone, shape_options)
        if saves is not None:
            _register_sharding(gradient, shards, batch.split(), alone, shape_options if saves_inputs else ())
    return forward


def fake(o: Op, *args, **options):
    """Output tensors from input tensors, without computing."""
    first = o.given(args)[o.declaration.first.name]
    return _returned(o, o.outputs(args, options, lambda t, size, dtype: first.new_empty(size, dtype=dtype)))


def _define(o: Op) -> None:
    """The schema, the fake kernel, and the reference as the kernel of every device without a better one.

    All of them validate, so that a direct `torch.ops.effvit` call with bad input raises before any work; compiled
    libraries check again in C++.
    """
    library = _dispatcher.LIBRARY
    library.define(o.schema, tags=_TAGS)
    for key in ("CompositeExplicitAutograd", "NestedTensorCPU", "NestedTensorCUDA"):  # the former has not the latter
        library.impl(o.name, _dispatcher.sees_conjugates(o.reference), key)
    torch.library.register_fake(
        f"effvit::{o.name}", lambda *args, **options: fake(o, *map(_as_contiguous, args), **options), lib=library
    )
    # Plain attributes: a compiler that traces a call reads them.
    o.__dict__["overload"] = getattr(torch.ops.effvit, o.name).default
    o.__dict__["pairs"] = tuple(option.name for option in o.declaration.options if option.type == "int[2]")
    OPS[o.name] = o


def _register_transforms(
    o: Op, function: type, tangent: Callable | None, batch: str, alone: str, autocast: bool
) -> None:
    _dispatcher.register_transforms(
        o.name,
        function,
        _transforms.forward_mode(o, tangent),
        _transforms.vmap_rule(o, batch.split(), alone),
        _transforms.autocast_rule(o, autocast),
    )


# ---- sharding --------------------------------------------------------------------------------------------------------


def _register_sharding(o: Op, shards: Sequence[str], batch: list, alone: str, shape_options: Sequence[str]) -> None:
    """DTensor: shard a dim wherever it occurs; tensors without it are replicated, gradients without it are sums."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    declaration = o.declaration

    def placement(t: Tensor, group: tuple, missing):
        dim = declaration.dim_of(t, group)
        return missing if dim is None else Shard(dim)

    @register_sharding(o.overload)
    def rule(*args, **options):
        tensors = o.given(args)
        inputs = declaration.tensors[: len(args)]
        together = alone and tensors.get(alone) is not None
        rules = []
        for group in ((), *(tuple(s.split()) for s in shards)):
            if together and {*group} & {*batch}:
                continue
            sums = Partial() if group and o.backward_of else Replicate()
            outs = []
            for t in declaration.outputs:
                absent = t.optional and tensors.get(t.name[1:]) is None
                outs.append(Replicate() if absent else placement(t, group, sums))
            ins = [None if tensors[t.name] is None else placement(t, group, Replicate()) for t in inputs]
            if not o.backward_of and any(p == Replicate() for p in outs) and group:
                continue  # an output that lacks the dim is no sum of anything
            rules.append((outs, ins))
        return rules

    if shape_options:
        _dispatcher.shapes_depend_on(o.overload, shape_options)
