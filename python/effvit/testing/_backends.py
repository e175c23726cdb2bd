"""Every implementation of an operator that can run on this machine, as plain callables with the op's signature."""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Backend:
    """One implementation; ``forward`` and ``backward`` are called like the ops of the schema."""

    name: str
    forward: Callable
    backward: Callable | None
    device: str = "cpu"
    slow: bool = False  # emulated or interpreted: only for samples tagged "small"
    # Forward and backward choose the implementation themselves; around calls from several threads choose it once, here.
    selected: Callable = contextlib.nullcontext

    def __repr__(self):
        return self.name


@contextlib.contextmanager
def isa(name):
    """Runs CPU kernels compiled for one instruction set."""
    from effvit import _backends

    before = _backends.isa()
    _backends.set_isa(name)
    try:
        yield
    finally:
        _backends.set_isa(before)


@contextlib.contextmanager
def small_tiles():
    """Kernels cut their work into the smallest pieces: small shapes then take every path that large ones take.

    On the CPU, in the emulator and in Triton's interpreter; for calls from one thread.
    """
    from effvit import _load
    from effvit.testing import emulator

    with contextlib.ExitStack() as stack:
        library = _load.load()["effvit_cpu"].handle
        if library is not None:
            before = library.effvit_cpu_set_small_tiles(1)
            stack.callback(library.effvit_cpu_set_small_tiles, before)
        if _emulator()[0] is not None:
            stack.enter_context(emulator.limits(target_ctas=2, max_shared_bytes=1))
        if importlib.util.find_spec("triton") is not None:
            stack.enter_context(importlib.import_module("effvit.triton_kernels._common").small_tiles())
        yield


def available_isas():
    """Instruction sets of the loaded CPU library, best last; empty without the library."""
    from effvit import _backends

    return _backends.isas()


def has_native_kernel(op, device="cpu"):
    """Whether a compiled library has registered `effvit::<op>` for the device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"effvit::{op}", key)


def _dispatched(op, call_within):
    def run(*args, **kwargs):
        with call_within(), torch.no_grad():
            return getattr(torch.ops.effvit, op)(*args, **kwargs)

    return run


def _has_backward(op):
    from effvit.ops._op import OPS

    return any(o.backward_of == op for o in OPS.values())


@functools.cache
def backends(op):
    """The list of Backend objects for `op`, reference first."""
    from effvit.ops._op import OPS

    backward = f"{op}_backward" if _has_backward(op) else None
    found = [Backend("reference", OPS[op].reference, OPS[backward].reference if backward else None)]

    if has_native_kernel(op):
        for name in available_isas():

            def within(name=name):
                return isa(name)

            run_backward = _dispatched(backward, within) if backward else None
            found.append(Backend(f"cpu:{name}", _dispatched(op, within), run_backward, selected=within))

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    if on_gpu and has_native_kernel(op, "cuda"):
        found.append(
            Backend(
                "cuda", _dispatched(op, contextlib.nullcontext),
                _dispatched(backward, contextlib.nullcontext) if backward else None, device,
            )
        )  # fmt: skip

    module = _triton_module(op)
    if module is not None:
        found.append(Backend("triton", module.forward, getattr(module, "backward", None), device, slow=not on_gpu))

    emulated, _ = _emulator()
    if emulated is not None and hasattr(torch.ops.effvit_emu, op):
        found.append(
            Backend(
                "emu", getattr(torch.ops.effvit_emu, op),
                getattr(torch.ops.effvit_emu, backward) if backward else None, slow=True,
            )
        )  # fmt: skip
    return found


def missing_backends(op):
    """{name: reason} of the implementations that cannot run here, for the tests' skip messages."""
    missing = {}
    if not has_native_kernel(op):
        missing["cpu"] = "no compiled CPU library is loaded"
    if not torch.cuda.is_available():
        missing["cuda"] = "no CUDA device"
    if _triton_module(op) is None:
        missing["triton"] = "triton is not installed, or TRITON_INTERPRET=1 was not set before it was imported"
    emulated, reason = _emulator()
    if emulated is None or not hasattr(torch.ops.effvit_emu, op):
        missing["emu"] = reason or "libeffvit_emu has no such op"
    return missing


def _triton_module(op):
    """The Triton launcher, if it can run: on a GPU, or in the interpreter (chosen when triton is first imported)."""
    import os

    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        importlib.import_module("triton")
    except ImportError:
        return None
    name = f"effvit.triton_kernels.{op}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name and name.startswith(e.name):
            return None
        raise


def _emulator():
    """(module or None, reason)"""
    from effvit.testing import emulator

    try:
        loaded = emulator.load()
    except OSError as e:  # built, but broken: the suite's list of backends fails on this
        return None, f"broken: libeffvit_emu does not load: {e}"
    if isinstance(loaded, tuple):
        return (loaded[0] or None), loaded[1]
    return loaded, "" if loaded else "libeffvit_emu is not built"
