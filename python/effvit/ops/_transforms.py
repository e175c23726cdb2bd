"""Autograd, torch.func, vmap and autocast of an operator, from its declaration.

Reverse mode of first order runs the op's kernel and that of the op that differentiates it. Everything else follows from
the definitions in PyTorch, at their speed and memory: the derivative of a backward op is the derivative of its
definition, and tangents are those of the definition, unless an op brings a rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from . import _dispatcher
from ._declaration import Tensor


def float_(t):
    """16-bit tensors in float32: what a definition is computed in."""
    return t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t


def as_tuple(results) -> tuple:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def as_declared(t: Tensor, x: torch.Tensor | None) -> torch.Tensor | None:
    """x in a layout that the op takes, where a transform may have changed it; `vmap` over a last dim, say."""
    strided = x is not None and t.layout == "" and x.dim() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1
    return x.contiguous() if x is not None and (t.layout == "whole" or strided) else x


def compose(o, args: Sequence, options: Mapping, definition: Callable | None = None) -> tuple:
    """The results of an op as its definition computes them, from differentiable PyTorch ops; nothing is checked."""
    tensors = o.given(args)
    options = {name: x for name, x in options.items() if name != "packed"}
    results = as_tuple((definition or o.definition)(*map(float_, tensors.values()), **options))
    empty = args[0].new_empty(0)
    return tuple(
        empty if x is None else x.to(o.dtype_of(t, tensors, options)).contiguous()
        for t, x in zip(o.declaration.outputs, results, strict=True)
    )  # fmt: skip


def is_empty(o, args: Sequence, options: Mapping) -> bool:
    """Nothing to compute, which definitions need not bear: whatever the op returns has no derivative."""
    args = [as_declared(t, x) for t, x in zip(o.declaration.tensors, args, strict=False)]
    return o.is_empty(o.bind(args, options)[0])


def gradients_of(function: Callable, tensors: Sequence, cotangents: Sequence, create_graph: bool) -> tuple:
    """Gradients of function(*tensors) -> tuple, by autograd, zeros where there is none."""
    with torch.enable_grad():
        leaves = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]
        results = [(r, g.to(r.dtype)) for r, g in zip(function(*leaves), cotangents, strict=True) if r.requires_grad]
        return torch.autograd.grad(
            [r for r, _ in results], leaves, [g for _, g in results], allow_unused=True, materialize_grads=True,
            create_graph=create_graph,
        )  # fmt: skip


def derivative(forward, definition: Callable, *args, **options) -> tuple:
    """The definition of a backward op: the gradients of all float inputs, None for those that are not given.

    args are the backward op's; differentiable in every one of them that the forward op has.
    """
    inputs = forward.declaration.tensors
    gradients = dict(zip((f"grad_{t.name}" for t in forward.declaration.outputs), args, strict=False))
    names = (*gradients, *(t.name for t in inputs if not t.optional))
    saved = len(args) - len(names) - sum(t.optional for t in inputs)
    tensors = dict(zip(names, args, strict=False))
    tensors |= dict(zip((t.name for t in inputs if t.optional), args[len(names) + saved :], strict=True))
    wanted = [t.name for t in inputs if t.is_float and tensors[t.name] is not None]
    given = [i for i, g in enumerate(gradients.values()) if g is not None]

    def outputs(*floats):
        changed = tensors | dict(zip(wanted, floats, strict=True))
        results = as_tuple(definition(*(changed[n] for n in forward.names), **options))
        return tuple(results[i] for i in given)

    floats = [float_(tensors[n]) for n in wanted]
    cotangents = [g for g in gradients.values() if g is not None]
    if _dispatcher.in_transform():
        results, pull = torch.func.vjp(outputs, *floats)
        found = pull(tuple(g.to(r.dtype) for g, r in zip(cotangents, results, strict=True)))
    else:  # in a kernel, a graph that is being traced or autograd's own backward: no levels of torch.func there
        found = gradients_of(outputs, floats, cotangents, any(t.requires_grad for t in (*floats, *cotangents)))
    named = dict(zip(wanted, found, strict=True))
    return tuple(named.get(t.name) for t in inputs if t.is_float)


# ---- reverse mode --------------------------------------------------------------------------------------------------


class Packing:
    """Gradients side by side in one tensor: see `packs` of `op`."""

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
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or _dispatcher.in_transform():
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


def recorder(forward, gradient, saves: Sequence[str], saves_inputs: bool, packing: Packing | None) -> type:
    """The autograd function of a forward op: its backward calls `gradient`, which can be differentiated again."""
    inputs, outputs = forward.declaration.tensors, forward.declaration.outputs
    kept = [i for i, t in enumerate(outputs) if t.name in saves]
    saved_names = [*(forward.names if saves_inputs else ()), *(outputs[i].name for i in kept)]
    grad_names = [f"grad_{t.name}" for t in outputs]
    own_dtype = [bool(t.dtype) for t in outputs]
    floats = [t.is_float for t in inputs]
    optional = {i: t.name for i, t in enumerate(inputs) if t.optional}
    like = gradient.declaration.first.name

    class Forward(_dispatcher.SingleLevelFunction):
        @staticmethod
        def forward(ctx, call, options, *tensors):
            returned = call(*tensors, **options)
            results = as_tuple(returned)
            tensors = (*tensors, *(None,) * (len(inputs) - len(tensors)))
            ctx.save_for_backward(*(tensors if saves_inputs else ()), *(results[i] for i in kept))
            ctx.options = options if saves_inputs else {}
            ctx.shape_of_first = results[0].shape
            ctx.empty = [o.numel() == 0 for o in results]
            ctx.given = len(ctx.needs_input_grad)
            ctx.set_materialize_grads(False)
            return returned

        @staticmethod
        def backward(ctx, *grads):
            if all(g is None for g in grads):
                return (None,) * ctx.given
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
            packed = packing is not None and not torch.is_grad_enabled() and packing.side_by_side(tensors)
            if packed:
                options = {**options, "packed": True}
            results = as_tuple(gradient.overload(*(tensors.get(n) for n in gradient.names), **options))
            results = iter(packing.split(results, tensors) if packed else results)
            found = [next(results) if is_float else None for is_float in floats]
            for i, name in optional.items():
                if tensors[name] is None:
                    found[i] = None
            return (None, None, *found)[: ctx.given]

    Forward.__name__ = Forward.__qualname__ = f"effvit_{forward.name}"
    return Forward


def recorder_of_definition(o) -> type:
    """The autograd function of an op that is differentiated by differentiating its definition."""

    class Gradient(_dispatcher.SingleLevelFunction):
        @staticmethod
        def forward(ctx, call, options, *tensors):
            ctx.save_for_backward(*tensors)
            ctx.options = options
            ctx.set_materialize_grads(False)
            return call(*tensors, **options)

        @staticmethod
        def backward(ctx, *grads):
            tensors, grads = tuple(map(_dispatcher.alive, ctx.saved_tensors)), tuple(map(_dispatcher.alive, grads))
            given = [i for i, g in enumerate(grads) if g is not None]
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
            found = [None] * len(tensors)

            def results(*changed):
                args = list(tensors)
                for i, t in zip(wanted, changed, strict=True):
                    args[i] = t
                composed = compose(o, args, o.complete(ctx.options), o.through)
                return tuple(composed[i] for i in given)

            if given and not is_empty(o, tensors, ctx.options):
                inputs, cotangents = [tensors[i] for i in wanted], tuple(grads[i] for i in given)
                with _dispatcher.without_autocast():
                    if _dispatcher.in_transform():
                        gradients = torch.func.vjp(results, *inputs)[1](cotangents)
                    else:
                        gradients = gradients_of(results, inputs, cotangents, torch.is_grad_enabled())
                for i, g in zip(wanted, gradients, strict=True):
                    found[i] = g
            return (None, None, *found)

    Gradient.__name__ = Gradient.__qualname__ = f"effvit_{o.name}"
    return Gradient


# ---- forward mode --------------------------------------------------------------------------------------------------


def forward_mode(o, tangent: Callable | None) -> Callable:
    """The kernel's results with tangents, from arguments of which some have one.

    tangent: ``(op, primals, tangents, results, options) -> tangents of the results``, dicts by name; of the arguments
    without a tangent it is None.
    """

    def rule(args, options, recorded):
        if recorded and not is_empty(o, args, options):  # its graph of PyTorch's ops saves tensors with their tangents
            results = compose(o, args, o.complete(options))
            if o.through is not None:  # its derivatives on the values of the definition
                smooth = compose(o, args, o.complete(options), o.through)
                values = (_dispatcher.primal_of(x).detach() for x in results)
                results = tuple(
                    x + (y - _dispatcher.primal_of(y).detach()) for x, y in zip(values, smooth, strict=True)
                )
            return results[0] if len(results) == 1 else results
        primals = tuple(map(_dispatcher.primal_of, args))
        results = as_tuple(o.overload(*primals, **options))
        if is_empty(o, primals, options):
            tangents = (None,) * len(results)
        elif tangent is None:
            tangents = map(_dispatcher.tangent_of, compose(o, args, o.complete(options), o.through))
        else:
            moved = {name: _dispatcher.tangent_of(t) for name, t in o.given(args).items()}
            tangents = tangent(o, o.given(primals), moved, results, o.complete(options))
        results = tuple(map(_dispatcher.dual_of, results, tangents))
        return results[0] if len(results) == 1 else results

    return rule


# ---- autocast, vmap ------------------------------------------------------------------------------------------------


def autocast_rule(o, enabled: bool) -> Callable:
    """The tensors that share the first one's dtype run in the autocast dtype; the others are read in their own.

    Like PyTorch's own ops under autocast, float64 is left alone, which the op then refuses as it does without.
    """
    cast = [enabled and not t.dtype for t in o.declaration.tensors]

    def to(dtype, *tensors):
        return tuple(
            t.to(dtype) if c and t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
            for t, c in zip(tensors, cast, strict=False)
        )

    return to


def vmap_rule(o, batch: Sequence[str], alone: str) -> Callable:
    """Fold the mapped dim into the batch where every mapped tensor and every output has one in front, else loop."""
    tensors, outputs = o.declaration.tensors, o.declaration.outputs
    foldable = [t.dims[:1] != () and t.dims[0] in batch for t in tensors]
    can_fold = all(t.dims[:1] != () and t.dims[0].rstrip("'") in batch for t in outputs)

    def rule(n, in_dims, args, options):
        mapped = [d is not None and a is not None for d, a in zip(in_dims, args, strict=True)]
        together = alone and any(t.name == alone and a is not None for t, a in zip(tensors, args, strict=False))
        if n == 0:  # no call: there are no values that every operator would take
            like = [
                None if a is None else a.new_empty(a.movedim(d, 0).shape[1:] if m else a.shape, device="meta")
                for a, d, m in zip(args, in_dims, mapped, strict=True)
            ]
            make = lambda t, size, dtype: next(a for a in args if a is not None).new_empty((0, *size), dtype=dtype)
            outs = o.outputs(like, options, make)
        elif can_fold and not together and all(f or not m for f, m in zip(foldable, mapped, strict=False)):
            moved = list(args)
            for i, a in enumerate(args):
                if foldable[i] and a is not None:
                    a = a.movedim(in_dims[i], 0) if mapped[i] else a.expand(n, *a.shape)
                    moved[i] = as_declared(tensors[i], a.reshape(n * a.shape[1], *a.shape[2:]))
            outs = [x.reshape(n, x.shape[0] // n, *x.shape[1:]) for x in as_tuple(o.overload(*moved, **options))]
        else:
            rows = []
            for j in range(n):
                one = (
                    a if not m else as_declared(t, a.select(d, j))
                    for t, a, d, m in zip(tensors, args, in_dims, mapped, strict=False)
                )
                rows.append(as_tuple(o.overload(*one, **options)))
            outs = [torch.stack(column) for column in zip(*rows, strict=True)]
        return outs[0] if len(outputs) == 1 else tuple(outs)

    return rule
