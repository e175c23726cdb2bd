"""Bad inputs that follow from an op's declaration: every argument missing, of another kind, shape, dtype or place."""

import math

import torch

from effvit.ops._op import OPS
from effvit.testing._spec import BadInput, split_call

_OTHER = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float16, torch.float16: torch.float32}


def declared_bad_inputs(name, good_call):
    """For the forward op: `good_call` is () -> {argument: value} with every optional tensor given."""
    op = OPS[name]
    return [*_of_tensors(op, good_call), *_of_options(op, good_call)]


def _bad(op, good_call, case, argument, error, change, *, torch_ops=True):
    def make():
        call = dict(good_call())
        call[argument] = change(call.get(argument))
        return split_call(call, op.names)

    return BadInput(
        f"declared_{argument}_{case}",
        make,
        error,
        f"(.* )?{argument} must ",
        schema_match=argument,
        torch_ops=torch_ops,
        declared=True,
    )


def _of_tensors(op, good_call):
    first = op.declaration.first
    for t in op.declaration.tensors:
        kind = (TypeError, ValueError)
        cases = {
            "list": (TypeError, lambda x: x.tolist()),
            "rank_above": (ValueError, lambda x: x[None]),
            "rank_0": (ValueError, lambda x: x.sum() if x.is_floating_point() else x.sum().to(x.dtype)),
            "integer": (TypeError, lambda x, t=t: x.to(torch.int64 if t.dtype == "integer" else torch.int16)),
            "sparse": (TypeError, lambda x: x.to_sparse()),
            "meta": (kind, lambda x: x.to("meta")),
        }
        if not t.optional:
            cases["none"] = (TypeError, lambda x: None)
        if t.is_float:
            cases["float64"] = (kind, lambda x: x.double())
        if t is not first and t.dtype != "float" and t.is_float:
            cases["other_dtype"] = (TypeError, lambda x: x.to(_OTHER[x.dtype]))
        if t.layout == "" and t.dims:
            cases["last_stride"] = (ValueError, lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2])
        if t is not first:
            for i, _ in enumerate(t.dims):
                if t not in op.declaration.main or t.dims[i] in first.dims:
                    cases[f"dim_{i}"] = (ValueError, lambda x, i=i: torch.cat((x, x), i))
        if t.dims[:1] == ("...",):
            for case in ("rank_above", "rank_0"):
                cases.pop(case)
        if t is first:
            cases.pop("meta")  # the others are then on another device, which is as well to say
        for case, (error, change) in cases.items():
            if case == "meta" and not t.is_float:
                continue
            yield _bad(op, good_call, case, t.name, error, change)


def _of_options(op, good_call):
    for o in op.declaration.options:
        yield _bad(op, good_call, "string", o.name, TypeError, lambda x: "x")
        yield _bad(op, good_call, "tensor", o.name, TypeError, lambda x: [torch.zeros(2)])
        if o.type.startswith("float"):
            for x in (math.nan, math.inf, -math.inf, 1e39):
                yield _bad(op, good_call, f"{x}", o.name, ValueError, lambda _, x=x: x)
            if o.constraint:
                yield _bad(op, good_call, "negative", o.name, ValueError, lambda x: -1.0)
            if o.constraint == "> 0":
                yield _bad(op, good_call, "zero", o.name, ValueError, lambda x: 0.0)
        if o.range:
            low, high = o.range
            for x in (low - 1, high + 1):
                yield _bad(op, good_call, f"{x}", o.name, ValueError, lambda _, x=x, o=o: [x, x] if o.elements else x)
        if o.type == "bool":
            yield _bad(op, good_call, "int", o.name, TypeError, lambda x: 1, torch_ops=False)
        if o.type == "int":
            yield _bad(op, good_call, "float", o.name, TypeError, lambda x: 1.5)
