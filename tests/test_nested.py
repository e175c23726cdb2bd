"""Nested tensors, strided or jagged: no op takes them, and every op says so."""

import importlib
import inspect
import warnings

import pytest
import torch

import effvit
from effvit.ops._op import OPS


def nested(layout, like, requires_grad=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are a prototype
        requires_grad = requires_grad and like.is_floating_point()
        return torch.nested.nested_tensor([*torch.atleast_2d(like)], layout=layout, requires_grad=requires_grad)


def spec_of(op):
    return importlib.import_module(f"effvit.testing.{OPS[op].backward_of or op}").SPEC


def call(op):
    """Tensors of a good call, by name, and the options without a default."""
    spec = spec_of(op)
    args, options = spec.good_input()
    needed = {o.name: options[o.name] for o in OPS[op].declaration.options if o.default is None}
    tensors = {name: t for name, t in zip(spec.tensors, args, strict=True) if t is not None}
    return tensors, needed


# Of which the arguments have the op's names. Others have a test of their own: tests/ops/test_gated_linear_attention.py.
FUNCTIONS = [
    op for op in effvit.ops.__all__ if {*OPS[op].names} <= inspect.signature(getattr(effvit.ops, op)).parameters.keys()
]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
@pytest.mark.parametrize("op, name", [(op, name) for op in FUNCTIONS for name in call(op)[0]])
def test_functions_refuse(op, name, layout, requires_grad):
    args, options = call(op)
    options = spec_of(op).public_kwargs(options) or {}
    args[name] = nested(layout, args[name], requires_grad)
    with pytest.raises(TypeError, match=rf"effvit::{op}: {name} must be a dense \(strided\) tensor, got nested"):
        getattr(effvit, op)(**args, **options)


def test_packed_sequences_are_no_nested_tensor():
    q = nested(torch.strided, torch.ones(2, 3, 2, 4))
    with pytest.raises(TypeError, match=r"effvit::linear_attention: q must be a dense \(strided\) tensor, got nested"):
        effvit.linear_attention(q, q, q, cu_seqlens=torch.tensor([0, 3, 6]))


@pytest.mark.parametrize("op", OPS)
def test_direct_calls_refuse(op):
    """A jagged tensor is a subclass of its own, which refuses what torch does not know before any op is asked."""
    tensors = [nested(torch.strided, torch.ones(2, 3, 4)) for _ in OPS[op].names]
    name = OPS[op].declaration.main[0].name
    with pytest.raises(TypeError, match=rf"effvit::{op}: {name} must be a dense \(strided\) tensor, got nested"):
        getattr(torch.ops.effvit, op)(*tensors, **call(op)[1])
