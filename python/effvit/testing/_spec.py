"""What an operator tells the shared test suite about itself: samples, bad inputs, cost, error magnitudes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    op: str | None = None  # defaults to the spec's forward op


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and the least bytes that must move between memory and the chip."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class OpSpec:
    """Everything tests/op_suite.py needs to know about an operator."""

    name: str
    samples: Sequence[Sample]
    tensors: Sequence[str]  # names of the positional tensor arguments, in order; missing trailing ones are None
    outputs: Sequence[str]
    reference: Callable  # differentiable, any float dtype: the definition
    cost: Callable  # (args, kwargs) -> Cost
    random_sample: Callable | None = None  # (name, random.Random) -> Sample: any options at once, at a small size
    random_calls: int = 400  # of a test run, on the machine's best instruction set
    bad_inputs: Sequence[BadInput] = ()
    good_input: Callable | None = None  # () -> (args, kwargs) of a call near every bad one
    # (args, kwargs, outputs, output_grads) -> (args, kwargs) of the backward op; None for an op without gradient
    backward_call: Callable | None = None
    # (result of the backward op, args, kwargs) -> {tensor name: gradient}
    split_gradients: Callable | None = None
    # (args, kwargs, output_grads or None, eps) -> ({output: magnitude}, {tensor name: magnitude of its gradient})
    magnitudes: Callable | None = None
    # dims of each tensor / output that may be symbolic under torch.compile and torch.export
    dynamic_dims: Mapping[str, Sequence[int]] = field(default_factory=dict)
    # (sample args, kwargs) -> the same call at another size of the dynamic dims
    resize: Callable | None = None
    # {"batch": {tensor or output: dim}}: DTensor shardings that need no communication; absent tensors are replicated
    shardings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    autocast_tensors: Sequence[str] = ()  # arguments that autocast casts
    # the op's keyword arguments -> those of the public function that mean the same; None where it has no such call
    public_kwargs: Callable = dict
    output_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # outputs whose dtype is not the input's
    # (dtype) -> [(name, args, kwargs)]: large calls for the memory test; built in a process of their own
    memory_calls: Callable | None = None
    memory_slack_per_thread: int = 2 << 20

    @property
    def qualified_name(self):
        return f"effvit::{self.name}"

    @property
    def backward_name(self):
        return f"{self.name}_backward" if self.backward_call else None

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


def named_tensors(spec, args):
    """{name: tensor} of the tensors that the call gives."""
    return {n: t for n, t in zip(spec.tensors, args, strict=False) if isinstance(t, torch.Tensor)}


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
