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

from . import _checks, _dispatcher
from ._declaration import Declaration, Tensor, backward_of, declare, join, names_in, solve, split, value

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
        if first:
            _checks.check_float(self.name, t.name, x)

    def _check_kind(self, t: Tensor, x: torch.Tensor, first: torch.Tensor) -> None:
        """dtype, device and layout."""
        op, name = self.name, self.declaration.first.name
        if t.dtype == "float":
            _checks.check_float(op, t.name, x)
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
        dims, _ = self.bind(args, options)
        tensors = self.given(args)
        first = tensors[self.declaration.first.name]
        made = []
        for t in self.declaration.outputs:
            dtype = first.dtype if not t.dtype else torch.float32 if t.dtype == "float" else getattr(torch, t.dtype)
            source = tensors.get(t.name[1:]) if self.backward_of else None
            size = [0] if t.optional and source is None else join(t.dims, dims)
            if source is not None:
                dtype = source.dtype
            made.append(make(t, size, dtype))
        return tuple(made)

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


def _float(t):
    return t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t


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
    second_derivative: str = "",
) -> Op:
    """Define `effvit::<name>` and `effvit::<name>_backward`; returns the former.

    Args:
        tensors, options: the declaration, "TENSORS -> OUTPUTS" and "OPTIONS": see ops/_declaration.py.
        reference: the definition, ``(*tensors, **options)``, differentiable; gets float32 for half precision.
        backward: the definition of the backward op, ``(*its tensors, **options) -> gradients``; None: autograd's
            derivative of `reference`.
        saves: names of the outputs that the backward op reads; None: the op has no gradient.
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
        second_derivative: what to differentiate for second derivatives, for the message.
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
        results = reference(*map(_float, forward.given(args).values()), **values)
        outs = results if isinstance(results, tuple) else (results,)
        like = forward.outputs(args, values, lambda t, size, dtype: dtype)
        return _returned(forward, _owned(args, outs, like))

    forward = Op(forward_declaration, run_reference, reference, **common)
    _define(forward)
    if saves is not None:
        declaration = backward_of(forward_declaration, tuple(saves.split()), saves_inputs, tuple(packs))
        if packs:
            packing = _Packing([t for t in forward_declaration.tensors if t.name in packs])
            common["derive"] = functools.partial(packing.derive, derive)
        if not saves_inputs:
            common |= {"derive": None, "check": None}
            common["limits"] = {
                f"{saves}{k[len(forward_declaration.first.name) :]}": x for k, x in common["limits"].items()
            }
        derivative = backward or functools.partial(_derivative, forward, reference)

        def run_backward(*args, **kwargs):
            dims, values = gradient.bind(args, kwargs)
            if gradient.is_empty(dims):
                make = lambda t, size, dtype: args[0].new_zeros(size, dtype=dtype)
                return _returned(gradient, gradient.outputs(args, values, make))
            packed = values.pop("packed", False)
            results = derivative(*gradient.given(args).values(), **values)
            results = results if isinstance(results, tuple) else (results,)
            if packed:
                results = packing.join(results)
                values["packed"] = True
            like = gradient.outputs(args, values, lambda t, size, dtype: dtype)
            given = (args[0].new_empty(0) if g is None else g for g in results)
            return _returned(gradient, _owned(args, given, like))

        gradient = Op(declaration, run_backward, derivative, backward_of=name, **common)
        _define(gradient)
        packing = packing if packs else None
        _register_autograd(forward, gradient, saves.split(), saves_inputs, packing, second_derivative)
        # Its dtypes are those of the forward; products inside its reference stay in float32.
        _dispatcher.register_autocast(gradient.name, lambda dtype, *tensors: tensors)
        _register_vmap(gradient, batch.split(), alone)
    _register_autocast(forward, autocast)
    _register_vmap(forward, batch.split(), alone)
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
    library.impl(o.name, o.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"effvit::{o.name}", lambda *args, **options: fake(o, *map(_as_contiguous, args), **options), lib=library
    )
    # Plain attributes: a compiler that traces a call reads them.
    o.__dict__["overload"] = getattr(torch.ops.effvit, o.name).default
    o.__dict__["pairs"] = tuple(option.name for option in o.declaration.options if option.type == "int[2]")
    OPS[o.name] = o


def _derivative(forward: Op, reference: Callable, *args, **options) -> tuple:
    """Gradients of all float inputs: autograd's, of the reference in float32."""
    gradients = dict(zip((f"grad_{t.name}" for t in forward.declaration.outputs), args, strict=False))
    names = (*gradients, *(t.name for t in forward.declaration.tensors if not t.optional))
    saved = len(args) - len(names) - sum(t.optional for t in forward.declaration.tensors)
    required, optional = args[: len(names)], args[len(names) + saved :]
    tensors = dict(zip(names, required, strict=True))
    tensors |= dict(zip((t.name for t in forward.declaration.tensors if t.optional), optional, strict=True))
    inputs = [tensors[n] for n in forward.names]
    with _dispatcher.autograd_below_autograd():
        leaves = [_float(t.detach()).requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
        outputs = reference(*leaves, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, gradients.values(), strict=True) if g is not None]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        found = iter(
            torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
            if wanted and any(o.requires_grad for o, _ in pairs)
            else [None] * len(wanted)
        )
    results = []
    for t, x in zip(forward.declaration.tensors, inputs, strict=True):
        if t.is_float:
            g = next(found) if x is not None else None
            results.append(
                torch.zeros_like(x, memory_format=torch.contiguous_format) if x is not None and g is None else g
            )
    return tuple(results)


# ---- autograd, autocast, vmap, sharding -----------------------------------------------------------------------------


class _Packing:
    """Gradients side by side in one tensor: see `packs` of :func:`op`."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tensors
        self.names = [t.name for t in tensors]

    def derive(self, derive, op, dims, options, tensors) -> None:
        if derive is not None:
            derive(op, dims, options, tensors)
        *_, heads, width = self.tensors[0].dims
        batch, packed = self.tensors[0].dims[0], options["packed"]
        total = dims[heads] * sum(dims[t.dims[-1]] for t in self.tensors)
        dims[f"{heads}'"], dims[f"{width}'"] = (1, total) if packed else (dims[heads], dims[width])
        dims[f"{batch}'"] = 0 if packed else dims[batch]

    def join(self, gradients: Sequence) -> tuple:
        several = gradients[: len(self.names)]
        whole = torch.cat([g.flatten(-2) for g in several], -1).unsqueeze(-2)
        return (whole, *(g[:0] for g in several[1:]), *gradients[len(self.names) :])

    def split(self, gradients: Sequence, tensors: Mapping) -> list:
        whole, first, views = gradients[0], 0, []
        for shape in (tensors[n].shape for n in self.names):
            width = shape[-2] * shape[-1]
            views.append(whole.narrow(-1, first, width).view(shape))  # is_grads_batched has rules for these views
            first += width
        return [*views, *gradients[len(views) :]]

    def side_by_side(self, tensors: Mapping) -> bool:
        """Whether the tensors lie side by side in one; only where there are data pointers to tell by."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            return False
        address = rows = None
        for name in self.names:
            t = tensors[name]
            if type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter:
                return False
            *outer, head, one = t.stride()
            if rows is None:
                address, rows, size = t.data_ptr(), outer, t.element_size()
            (heads, width) = t.shape[-2:]
            if one != 1 or head != width or outer != rows or t.data_ptr() != address or not address:
                return False
            address += heads * width * size
        return True


def _register_autograd(
    forward: Op, gradient: Op, saves: list, saves_inputs: bool, packing: _Packing | None, second_derivative: str
) -> None:
    declaration = forward.declaration
    inputs, outputs = declaration.tensors, declaration.outputs
    kept = [i for i, t in enumerate(outputs) if t.name in saves]
    saved_names = [*(forward.names if saves_inputs else ()), *(outputs[i].name for i in kept)]
    grad_names = [f"grad_{t.name}" for t in outputs]
    own_dtype = [bool(t.dtype) for t in outputs]
    floats = [t.is_float for t in inputs]
    optional = {i: t.name for i, t in enumerate(inputs) if t.optional}
    like = gradient.declaration.first.name

    def setup_context(ctx, inputs, output, keyword_only_inputs=None):
        results = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*(inputs if saves_inputs else ()), *(results[i] for i in kept))
        ctx.options = dict(keyword_only_inputs or {}) if saves_inputs else {}
        ctx.shape_of_first = results[0].shape
        ctx.empty = [o.numel() == 0 for o in results]
        ctx.set_materialize_grads(False)

    def backward(ctx, *grads):
        if all(g is None for g in grads):
            return (None,) * len(inputs)
        tensors = dict(zip(saved_names, ctx.saved_tensors, strict=True))
        for i, g in enumerate(grads):
            if g is None:
                g = tensors[like].new_zeros(ctx.shape_of_first) if i == 0 else None
            elif i > 0 and ctx.empty[i]:
                g = None
            elif not own_dtype[i] and g.shape[-1] > 1 and g.stride(-1) != 1:
                g = g.contiguous()
            tensors[grad_names[i]] = g
        options = ctx.options
        packed = packing is not None and packing.side_by_side(tensors)
        if packed:
            options = {**options, "packed": True}
        results = gradient.overload(*(tensors.get(n) for n in gradient.names), **options)
        results = results if isinstance(results, (tuple, list)) else (results,)
        results = iter(packing.split(results, tensors) if packed else results)
        found = [next(results) if is_float else None for is_float in floats]
        for i, name in optional.items():
            if tensors[name] is None:
                found[i] = None
        return tuple(found)

    def no_double_backward(ctx, *grads):
        instead = second_derivative or f"effvit.reference.{forward.name}, which is plain PyTorch"
        raise NotImplementedError(
            f"effvit::{gradient.name} is not differentiable: for second derivatives differentiate {instead}"
        )

    library = _dispatcher.LIBRARY
    torch.library.register_autograd(f"effvit::{forward.name}", backward, setup_context=setup_context, lib=library)
    torch.library.register_autograd(f"effvit::{gradient.name}", no_double_backward, lib=library)


def _register_autocast(o: Op, enabled: bool) -> None:
    """The tensors that share the first one's dtype run in the autocast dtype; the others are read in their own."""
    cast = [enabled and not t.dtype for t in o.declaration.tensors]

    def to(dtype, *tensors):
        return tuple(
            t.to(dtype) if c and t is not None and t.is_floating_point() else t
            for t, c in zip(tensors, cast, strict=False)
        )

    _dispatcher.register_autocast(o.name, to)


def _register_vmap(o: Op, batch: list, alone: str) -> None:
    """Fold the mapped dim into the batch where every mapped tensor and every output has one in front, else loop."""
    tensors, outputs = o.declaration.tensors, o.declaration.outputs
    foldable = [t.dims[:1] != () and t.dims[0] in batch for t in tensors]
    can_fold = all(t.dims[:1] != () and t.dims[0].rstrip("'") in batch for t in outputs)

    def rule(info, in_dims, *args, **kwargs):
        mapped = [d is not None and a is not None for d, a in zip(in_dims, args, strict=True)]
        n = info.batch_size
        together = alone and any(t.name == alone and a is not None for t, a in zip(tensors, args, strict=False))
        if n > 0 and can_fold and not together and all(f or not m for f, m in zip(foldable, mapped, strict=False)):
            moved = list(args)
            for i, a in enumerate(args):
                if foldable[i] and a is not None:
                    a = a.movedim(in_dims[i], 0) if mapped[i] else a.expand(n, *a.shape)
                    moved[i] = a.reshape(n * a.shape[1], *a.shape[2:])
            outs = o.overload(*moved, **kwargs)
            outs = outs if isinstance(outs, (tuple, list)) else (outs,)
            outs = [x.reshape(n, x.shape[0] // n, *x.shape[1:]) for x in outs]
        else:
            rows = []
            for j in range(n):
                one = (a.select(d, j) if m else a for a, d, m in zip(args, in_dims, mapped, strict=True))
                result = o.overload(*one, **kwargs)
                rows.append(result if isinstance(result, (tuple, list)) else (result,))
            outs = [torch.stack(column) for column in zip(*rows, strict=True)]
        return (outs[0], 0) if len(outputs) == 1 else (tuple(outs), (0,) * len(outs))

    torch.library.register_vmap(f"effvit::{o.name}", rule, lib=_dispatcher.LIBRARY)


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
