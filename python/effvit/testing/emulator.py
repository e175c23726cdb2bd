"""Loads libeffvit_emu.so: the CUDA kernels in the CPU emulator, as ``torch.ops.effvit_emu.<op>`` on CPU tensors.

The emulator runs one thread as one fiber and checks every access; see csrc/emu. For tests at small shapes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch

from effvit import _load
from effvit.ops._op import OPS

_library = None  # the definitions live as long as this object


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """``(library, "")``, or ``(None, reason)`` where it was not built. Defines effvit_emu's schemas like effvit's."""
    global _library
    path = _load.library_path("effvit_emu")
    if path is None:
        return None, "libeffvit_emu.so is not built (configure with -DEFFVIT_BUILD_EMU=ON)"
    handle = ctypes.CDLL(str(path))
    handle.effvit_abi_signatures.restype = ctypes.c_char_p
    handle.effvit_emu_set_seed.argtypes = [ctypes.c_uint64]
    handle.effvit_emu_set_seed.restype = None
    handle.effvit_emu_set_limits.argtypes = [ctypes.c_int, ctypes.c_int]
    handle.effvit_emu_set_limits.restype = None
    handle.effvit_emu_launch_count.argtypes = [ctypes.c_char_p]
    handle.effvit_emu_launch_count.restype = ctypes.c_int64
    handle.effvit_emu_reset_counters.restype = None
    handle.effvit_emu_kernels.restype = ctypes.c_char_p
    _library = torch.library.Library("effvit_emu", "FRAGMENT")
    for line in handle.effvit_abi_signatures().decode().splitlines():
        op = OPS[line.split("(", 1)[0]]
        _library.define(op.schema)
    return handle, ""


def _loaded() -> ctypes.CDLL:
    handle, reason = load()
    if handle is None:
        raise RuntimeError(f"effvit: {reason}")
    return handle


def launch_counts() -> dict[str, int]:
    """How often each kernel ran since the library was loaded or :func:`reset_counts` was called."""
    handle = _loaded()
    names = handle.effvit_emu_kernels().decode().split(",")
    return {name: handle.effvit_emu_launch_count(name.encode()) for name in names if name}


def reset_counts() -> None:
    _loaded().effvit_emu_reset_counters()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Threads, warps and CTAs run in the order that ``seed`` gives; 0 is the natural one."""
    handle = _loaded()
    handle.effvit_emu_set_seed(seed)
    try:
        yield
    finally:
        handle.effvit_emu_set_seed(0)


@contextlib.contextmanager
def limits(target_ctas: int = 0, max_shared_bytes: int = 0) -> Iterator[None]:
    """Kernels plan for that many CTAs and that much shared memory of a CTA; 0 is the default (6 CTAs, 99 KiB).

    Small numbers bring small shapes onto the long paths: several tiles a CTA, sums in one piece or many, operands
    streamed. They choose between plans; a kernel that has no smaller one takes the shared memory it needs.
    """
    handle = _loaded()
    handle.effvit_emu_set_limits(target_ctas, max_shared_bytes)
    try:
        yield
    finally:
        handle.effvit_emu_set_limits(0, 0)
