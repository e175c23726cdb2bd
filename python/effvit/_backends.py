"""Which implementation of an operator runs on a device, and why not the others; the CPU library's instruction set."""

from __future__ import annotations

import ctypes
import dataclasses
import platform

import torch

from . import _load


@dataclasses.dataclass(frozen=True)
class Choice:
    """One implementation of an op on a device type: it runs, or the reason why not and the fix."""

    name: str
    runs: bool
    reason: str = ""
    fix: str = ""


def choices(op: str, device_type: str) -> list[Choice]:
    """The implementations of `effvit::<op>` for tensors of a device type, best first; exactly one runs."""
    order = ("cpu", "cuda", "triton") if device_type == "cpu" else ("cuda", "triton", "cpu")
    found: list[Choice] = []
    runs = None
    for name in order:
        device = "cpu" if name == "cpu" else "cuda"
        if device != device_type:
            choice = Choice(name, False, f"runs on {device} tensors")
        elif runs is not None:
            choice = Choice(name, False, f"{runs} comes first")
        else:
            choice = _triton_choice(op) if name == "triton" else _library_choice(op, name)
        runs = name if choice.runs else runs
        found.append(choice)
    return [*found, Choice("reference", runs is None, f"{runs} comes first" if runs else "")]


def _library_choice(op: str, name: str) -> Choice:
    library = _load.load()[f"effvit_{name}"]
    if library.handle is None:
        return Choice(name, False, library.reason, library.fix)
    if op not in library.signatures:
        return Choice(name, False, f"effvit_{name} has no kernel of {op}", _load.REBUILD)
    return Choice(name, True, f"instruction set {isa()}" if name == "cpu" else "")


def _triton_choice(op: str) -> Choice:
    if op in _load.TRITON_OPS:
        return Choice("triton", True)
    reason, fix = _load.triton_obstacle()
    return Choice("triton", False, reason or f"no Triton kernel of {op}", fix)


def chosen(op: str, device_type: str) -> Choice:
    return next(c for c in choices(op, device_type) if c.runs)


# ---- instruction sets of the CPU library ---------------------------------------------------------------------------


def _cpu_library() -> ctypes.CDLL | None:
    return _load.load()["effvit_cpu"].handle


def isas() -> list[str]:
    """Instruction sets that the CPU library can use on this machine, best last; empty without the library."""
    library = _cpu_library()
    return _load.text(library, "effvit_cpu_available_isas").split(",") if library else []


def built_isas() -> list[str]:
    """Instruction sets that the CPU library was compiled for; empty without the library."""
    library = _cpu_library()
    return _load.text(library, "effvit_cpu_built_isas").split(",") if library else []


def isa() -> str | None:
    """The instruction set in use, or None without the CPU library."""
    library = _cpu_library()
    return _load.text(library, "effvit_cpu_isa") if library else None


def set_isa(name: str) -> None:
    """Make the CPU library use one of `isas()`, for every thread, from the next call on."""
    library = _cpu_library()
    if library is None:
        raise RuntimeError(f"effvit: the CPU library is not loaded: {_load.load()['effvit_cpu'].reason}")
    if library.effvit_cpu_set_isa(ctypes.c_char_p(name.encode())) != 0:
        raise ValueError(f"effvit: isa must be one of {', '.join(isas())}, got {name}")


# ---- the machine ---------------------------------------------------------------------------------------------------


def _cpuinfo(field: str) -> str:
    """What Linux says of the first processor; "" where it says nothing."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.split(":")[0].strip() == field), "")
    except OSError:
        return ""


def cpu_features() -> list[str]:
    """Instruction sets that kernels can make use of: the CPU has them, and the system saves their registers."""
    wanted = (
        "avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
        "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8",
    )  # fmt: skip
    flags = _cpuinfo("flags").split()
    return [name for name in wanted if name in flags]


def amx_permission() -> bool:
    """Whether this process may use AMX tiles, on x86-64 Linux; the kernels ask for it at their first use."""
    arch_prctl, get_xcomp_perm, tile_data = 158, 0x1022, 1 << 18
    mask = ctypes.c_uint64()
    failed = ctypes.CDLL(None).syscall(
        ctypes.c_long(arch_prctl), ctypes.c_long(get_xcomp_perm), ctypes.byref(mask)
    )  # fmt: skip
    return not failed and bool(mask.value & tile_data)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo("model name") or platform.processor() or platform.machine()
