"""What other tools ask of the operators: decompositions into core ATen, formulas for torch's FLOP counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ._when_imported import when_imported
from .ops import _dispatcher, _transforms
from .ops._op import OPS, Op


def decompositions() -> dict:
    """Decompositions of every operator into core ATen, for ``program.run_decompositions(effvit.decompositions())``.

    For runtimes that have no operators of effvit's (ExecuTorch, OpenVINO, ONNX from an exported program): a patched
    model lowers without `effvit.unpatch`. Packed sequences (cu_seqlens) do not, as their lengths are data.

    Returns:
        ``torch.export.default_decompositions()`` with an entry for each operator, forward and backward: its definition
        in PyTorch, at the memory and speed of that.
    """
    table = torch.export.default_decompositions()
    table.update({o.overload: _decomposition(o) for o in OPS.values()})
    return table


def _decomposition(o: Op) -> Callable:
    def decomposed(*args, **options):
        call = lambda *args: _transforms.compose(o, args, o.complete(options))
        results = _traced(call, args) if o.backward_of else call(*args)
        return results[0] if len(results) == 1 else results

    return decomposed


def _traced(call: Callable, args: Sequence) -> tuple:
    """call(*args) by way of a graph of its own: autograd records nothing inside of a graph that is being lowered."""
    given = [i for i, a in enumerate(args) if a is not None]

    def of_given(*tensors):
        every = dict(zip(given, tensors, strict=True))
        return call(*(every.get(i) for i in range(len(args))))

    with _dispatcher.outside_of_every_trace(), FakeTensorMode():
        like = [
            torch.empty_strided([*map(int, a.shape)], [*map(int, a.stride())], dtype=a.dtype, device=a.device)
            for a in (args[i] for i in given)
        ]  # fmt: skip
        graph = make_fx(of_given)(*like)
    return graph(*(args[i] for i in given))


def _register_flops(module) -> None:
    for o in OPS.values():
        if o.flops is not None:

            def formula(*args, out_val=None, o=o, **options):
                return o.cost(args, o.complete(options)).flops

            module.register_flop_formula(o.overload.overloadpacket, get_raw=True)(formula)


def register_flop_formulas() -> None:
    """`torch.utils.flop_counter.FlopCounterMode` counts the operators by the cost that each declares."""
    when_imported("torch.utils.flop_counter", _register_flops)  # it imports Triton, which takes a second
