"""What an operator tells the shared test suite about itself: samples, bad inputs, cost, error magnitudes."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from effvit.ops._checks import FLOAT_DTYPES
from effvit.ops._op import OPS

__all__ = ["FLOAT_DTYPES", "OPS", "BadInput", "OpSpec", "Sample"]


@dataclass(frozen=True)
class Sample:
    """One call: ``make(dtype, device, generator) -> (args, kwargs)``, positional tensors and keyword arguments.

    Tags: ``small`` the emulator and the Triton interpreter run it too, in the first dtype, in others where it is
    also ``framework``; ``tiny`` small enough for gradcheck; ``vit`` a geometry of a real network; ``nasty``,
    ``strided``, ``empty``, ``huge`` say what is special; ``framework`` used for opcheck, compile, vmap and the like.
    """

    name: str
    make: Callable
    tags: frozenset = frozenset()
    dtypes: Sequence = FLOAT_DTYPES

    def build(self, dtype=torch.float32, device="cpu"):
        """The call's arguments; the same numbers every time."""
        seed = sum((i + 1) * ord(c) for i, c in enumerate(self.name))
        return self.make(dtype, device, torch.Generator("cpu").manual_seed(seed))


@dataclass(frozen=True)
class BadInput:
    """A call that must raise before any work. ``make() -> (args, kwargs)``.

    ``match`` must be found in the message. ``schema_match`` is what may stand in the message of a direct ``torch.ops``
    call instead: torch's own schema check rejects some values, and hands None on as an empty tensor.
    ``torch_ops=False``: the schema check converts the value silently, so only the Python function can see it.
    ``public=False``: the op has no public Python function.
    """

    name: str
    make: Callable
    error: type | tuple
    match: str
    schema_match: str | None = None
    torch_ops: bool = True
    public: bool = True
    declared: bool = False  # follows from the declaration: options are as the schema has them
    op: str | None = None  # defaults to the spec's forward op


@dataclass(frozen=True)
class OpSpec:
    """What tests/op_suite.py needs to know about an operator beyond its declaration."""

    name: str
    samples: Sequence[Sample]
    # differentiable, any float dtype, with the op's keyword arguments; by default the op's definition
    # (of an integer output: what is then rounded to the nearest integer)
    definition: Callable | None = None
    random_sample: Callable | None = None  # (name, random.Random) -> Sample: any options at once, at a small size
    random_calls: int = 400  # of a test run, on the machine's best instruction set
    bad_inputs: Sequence[BadInput] = ()
    good_call: Callable | None = None  # () -> {argument: value} of a call near every bad one
    # (args, kwargs, output_grads or None, eps) -> ({output: magnitude}, {tensor name: magnitude of its gradient})
    magnitudes: Callable | None = None
    dynamic: str = ""  # names of the dims that may be symbolic under torch.compile and torch.export
    # (sample args, kwargs) -> the same call at another size of the dynamic dims
    resize: Callable | None = None
    # the op's keyword arguments -> those of the public function that mean the same; None where it has no such call
    public_kwargs: Callable = dict
    rolled: Callable = lambda t, i: t.flatten().roll(i).view(t.shape)  # other values that a tensor of integers may have
    ordered: Sequence[str] = ()  # tensors whose elements must ascend
    # (dtype) -> [(name, args, kwargs)]: large calls for the memory test; built in a process of their own
    memory_calls: Callable | None = None
    memory_slack_per_thread: int = 2 << 20

    # ---- what follows from the declaration

    @functools.cached_property
    def declared(self):
        return OPS[self.name]

    @functools.cached_property
    def gradient(self):
        """The op that differentiates this one, or None."""
        return OPS.get(f"{self.name}_backward")

    @property
    def tensors(self):
        return self.declared.names

    @functools.cached_property
    def outputs(self):
        return tuple(t.name for t in self.declared.declaration.outputs)

    def output_dtypes(self, args, kwargs):
        """{output: dtype} of a call."""
        dtypes = self.declared.outputs(args, kwargs, lambda t, size, dtype: dtype)
        return dict(zip(self.outputs, dtypes, strict=True))

    @functools.cached_property
    def autocast_tensors(self):
        """Arguments that autocast casts."""
        return tuple(t.name for t in self.declared.declaration.tensors if not t.dtype and self.declared.autocast)

    @functools.cached_property
    def dynamic_dims(self):
        """{tensor: dims that may be symbolic}"""
        names = self.dynamic.split()
        dims = {t.name: tuple(i for i, d in enumerate(t.dims) if d in names) for t in self.declared.declaration.tensors}
        return {name: found for name, found in dims.items() if found}

    @functools.cached_property
    def shardings(self):
        """{"B": {tensor or output: dim}}: DTensor shardings that need no communication; the rest is replicated."""
        declaration = self.declared.declaration
        found = {}
        for group in self.declared.shards:
            dims = {t.name: declaration.dim_of(t, group.split()) for t in (*declaration.tensors, *declaration.outputs)}
            found[group] = {name: dim for name, dim in dims.items() if dim is not None}
        return found

    def reference(self, *args, **kwargs):
        options = self.declared.complete(kwargs)
        return (self.definition or self.declared.definition)(*self.declared.given(args).values(), **options)

    def cost(self, args, kwargs, backward=False):
        return self.declared.cost(args, kwargs, backward)

    @property
    def backward_call(self):
        """(args, kwargs, outputs, output_grads) -> (args, kwargs) of the backward op; None for an op without."""
        return self._backward_call if self.gradient else None

    def _backward_call(self, args, kwargs, outputs, output_grads):
        values = self.declared.given(args) | dict(zip(self.outputs, outputs, strict=True))
        values |= {f"grad_{n}": g for n, g in zip(self.outputs, output_grads, strict=True)}
        return tuple(values[n] for n in self.gradient.names), kwargs if self.gradient.declaration.options else {}

    def split_gradients(self, result, args, kwargs):
        """{tensor: gradient} from what the backward op returned, after a look at dtypes, shapes and strides."""
        given, gradients = self.declared.given(args), {}
        first = given[self.declared.declaration.first.name]
        for t, g in zip(self.gradient.declaration.outputs, as_tuple(result), strict=True):
            x = given[t.name[1:]]
            dtype = x.dtype if x is not None else torch.float32 if t.dtype else first.dtype
            shape = (0,) if x is None else tuple(x.shape)
            if g.dtype != dtype or tuple(g.shape) != shape or not g.is_contiguous():
                raise AssertionError(
                    f"{t.name} must be {dtype} {list(shape)}, contiguous, got {g.dtype} {list(g.shape)}, {g.stride()}"
                )
            if x is not None:
                gradients[t.name[1:]] = g
        return gradients

    def good_input(self):
        return split_call(self.good_call(), self.tensors)

    @property
    def qualified_name(self):
        return f"effvit::{self.name}"

    @property
    def backward_name(self):
        return self.gradient.name if self.gradient else None

    def op(self):
        return getattr(torch.ops.effvit, self.name)

    def backward_op(self):
        return getattr(torch.ops.effvit, self.backward_name)

    def public(self):
        import effvit.ops

        return getattr(effvit.ops, self.name)

    def tagged(self, tag):
        return [s for s in self.samples if tag in s.tags]

    def sample(self, name):
        return next(s for s in self.samples if s.name == name)


def split_call(call, names):
    """(positional tensors in the order of names, everything else as keyword arguments)"""
    return tuple(call[n] for n in names), {n: x for n, x in call.items() if n not in names}


def named_tensors(spec, args):
    """{name: tensor} of the tensors that the call gives."""
    return {n: t for n, t in zip(spec.tensors, args, strict=False) if isinstance(t, torch.Tensor)}


def differentiable_tensors(spec, args):
    """{name: tensor} of those that can have a gradient."""
    return {n: t for n, t in named_tensors(spec, args).items() if t.is_floating_point()}


def map_tensors(fn, args):
    """The positional arguments with fn applied to every tensor."""
    return tuple(fn(a) if isinstance(a, torch.Tensor) else a for a in args)


def as_tuple(result):
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def with_grad(args):
    """Leaves that require grad and have the same strides, offsets and values."""

    def leaf(t):
        return t.detach().requires_grad_(t.is_floating_point())

    return map_tensors(leaf, args)


def accepts(fn, name):
    return name in inspect.signature(fn).parameters
