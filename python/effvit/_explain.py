"""effvit.explain: which kernel a call runs, why not the others, what it costs and how long it must take at least."""

from __future__ import annotations

import dataclasses
import functools
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import _backends, _cutlass, ops
from .ops._op import OPS, Op


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device sustains: bytes/s of a copy (read + write) and FLOP/s of a matrix product."""

    bytes_per_second: float
    flops_per_second: float


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `effvit.explain` found; printing it shows the table."""

    op: str
    device: str
    kernel: str
    choices: tuple[_backends.Choice, ...]
    flops: int
    bytes: int
    rates: Rates
    seconds: float  # the roofline: max(bytes / bandwidth, FLOPs / GEMM rate)
    bound: str  # "memory" or "compute"

    def __str__(self):
        lines = [f"effvit::{self.op} on {self.device}"]
        for choice in self.choices:
            note = f"  {choice.reason}" if choice.reason else ""
            note += f" (to change: {choice.fix})" if choice.fix else ""
            lines.append(f"  {'runs' if choice.runs else 'no':5} {choice.name:10}{note}")
        lines.append(f"  cost  {self.flops / 1e9:.4g} GFLOP, {self.bytes / 1e6:.4g} MB")
        lines.append(
            f"  roof  {self.seconds * 1e3:.4g} ms, {self.bound} bound ({self.rates.bytes_per_second / 1e9:.4g} GB/s, "
            f"{self.rates.flops_per_second / 1e12:.4g} TFLOP/s)"
        )
        return "\n".join(lines)

    __repr__ = __str__


def _best_seconds(call, device: torch.device, repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats + 1):  # the first is warm-up that can only be slower
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def _measure_rates(device: torch.device, dtype: torch.dtype, threads: int) -> Rates:
    source = torch.ones(64 << 20, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = _best_seconds(lambda: target.copy_(source), device)
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, dtype=dtype, device=device)
    out = torch.empty_like(a)
    gemm = _best_seconds(lambda: torch.mm(a, a, out=out), device)
    return Rates(2 * source.numel() * 4 / copy, 2 * n**3 / gemm)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Copy bandwidth and GEMM rate of a device, measured once per process, dtype and number of threads."""
    return _measure_rates(device, dtype, torch.get_num_threads())


class _Reached(BaseException):
    """The arguments of a call of an op, on their way out of the public function. An op explains any Exception."""


class _StopAt(TorchDispatchMode):
    """Calls of other ops run."""

    def __init__(self, op: Op):
        super().__init__()
        self.op = op

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.op.overload:
            raise _Reached(args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _call(op: str, args: tuple, options: dict) -> tuple[tuple, dict]:
    """(tensors, all options) of the call of an op, from its own arguments or from those of its public function."""
    failure = None
    if op in ops.__all__:
        try:
            with _StopAt(OPS[op]):
                getattr(ops, op)(*args, **options)
        except _Reached as reached:
            args, options = reached.args
        except (TypeError, ValueError) as error:
            failure = error
    try:
        return args, OPS[op].validate(*args, **options)
    except (TypeError, ValueError) as error:
        raise failure or error from None


def explain(op: str, *args, rates: Rates | None = None, **kwargs) -> Explanation:
    """Which kernel `effvit.<op>(*args, **kwargs)` runs, why not the others, and its roofline.

    The arguments are those of the function or, for what it does not take, those of `torch.ops.effvit.<op>`, backward
    ops included. Nothing of the op runs, but the arguments are checked. `rates` replaces the measured rates of the
    device. Example::

        print(effvit.explain("window_attention", q, k, v, table, window=7, shift=3))
    """
    if op not in OPS:
        raise ValueError(f"effvit::explain: op must be one of {', '.join(OPS)}, got {op}")
    args, options = _call(op, args, kwargs)
    first = next(a for a in args if a is not None)
    device, dtype = first.device, first.dtype
    choices = tuple(_backends.choices(op, device.type))
    if op in _cutlass.OPS:
        choices = tuple(
            dataclasses.replace(c, reason=_cutlass.explained(op, args, options)) if c.runs and c.name == "cuda" else c
            for c in choices
        )
    cost = OPS[op].cost(args, options)
    rates = rates or measure_rates(device, dtype)
    memory, compute = cost.bytes / rates.bytes_per_second, cost.flops / rates.flops_per_second
    seconds, bound = max((memory, "memory"), (compute, "compute"))
    name = f"{device} ({_backends.device_name(device)})"
    kernel = next(c.name for c in choices if c.runs)
    return Explanation(op, name, kernel, choices, cost.flops, cost.bytes, rates, seconds, bound)
