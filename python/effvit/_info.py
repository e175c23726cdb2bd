"""`python -m effvit info`: versions, machine, libraries, the kernel of every op, and what to type to change it."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from . import _backends, _load
from .ops._op import OPS


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{n} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})" for i, n in enumerate(names))


def _permission() -> str:
    if "amx_tile" not in _backends.cpu_features():
        return "this CPU has no AMX"
    return "granted" if _backends.amx_permission() else "not asked for yet (the kernels ask at their first use)"


def _isas() -> str:
    usable = _backends.isas()
    if not usable:
        return "none: the CPU library is not loaded"
    lacking = [isa for isa in _backends.built_isas() if isa not in usable]
    lacks = f"; built, but this machine lacks it: {', '.join(lacking)}" if lacking else ""
    return f"{_backends.isa()} of {', '.join(usable)}{lacks}"


def lines() -> list[str]:
    """The report, line by line."""
    from . import __version__

    libraries = _load.load()
    out = ["versions"]
    rows = [
        ("effvit", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'no'}, {torch.get_num_threads()} threads)"),
    ]
    rows += [(name, _version(name)) for name in ("triton", "timm", "torchvision", "transformers", "numpy")]
    out += [f"  {name:14}{value}" for name, value in rows]

    out += ["", "machine"]
    out.append(f"  {'CPU':14}{_backends.device_name(torch.device('cpu'))}")
    out.append(f"  {'features':14}{' '.join(_backends.cpu_features()) or 'none of AVX2, AVX-512, AMX'}")
    out.append(f"  {'AMX':14}{_permission()}")
    out.append(f"  {'ISA':14}{_isas()}")
    out.append(f"  {'GPU':14}{_gpu()}")
    for variable in ("EFFVIT_BACKEND", "EFFVIT_ISA", "EFFVIT_CUTLASS", "EFFVIT_LIB_DIR"):
        if os.environ.get(variable):
            out.append(f"  {variable:14}={os.environ[variable]}")

    out += ["", f"libraries ({_load.library_dir()})"]
    fixes: dict[str, str] = {}
    for name, library in libraries.items():
        state = "loaded" if library.handle is not None else f"not loaded: {library.reason}"
        built = _load.build_status(name) if library.path else ""
        out.append(f"  {name:14}{state}{f'; built with {built}' if built and not built.startswith('not') else ''}")
        if library.fix:
            fixes[name] = library.fix
    cutlass = _load.build_status("cutlass")
    out.append(f"  {'cutlass':14}{cutlass if cutlass.startswith('not') else f'in effvit_cuda: {cutlass}'}")
    if cutlass.startswith("not built: ") and "CUTLASS" in cutlass:
        fixes["cutlass"] = _load.fix_of_build(cutlass)
    reason, fix = _load.triton_obstacle()
    out.append(f"  {'triton':14}{f'not used: {reason}' if reason else 'used where there is no CUDA kernel'}")
    if fix:
        fixes["triton"] = fix

    out += ["", "kernels"]
    for op in OPS:
        for device in ("cpu", "cuda"):
            choices = _backends.choices(op, device)
            runs = next(c for c in choices if c.runs)
            detail = f" ({runs.reason})" if runs.reason else ""
            out.append(f"  {op} on {device}: {runs.name}{detail}")
            for c in choices:
                if not c.runs and "tensors" not in c.reason and "comes first" not in c.reason:
                    out.append(f"    not {c.name}: {c.reason}")
    if fixes:
        out += ["", "to change"]
        out += [f"  {name:14}{fix}" for name, fix in fixes.items()]
    return out


def main() -> int:
    print("\n".join(lines()))
    return 0
