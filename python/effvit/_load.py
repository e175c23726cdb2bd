"""Finds and loads the native libraries, registers the Triton kernels; records why something is not there.

EFFVIT_BACKEND=reference|cpu|triton|cuda: only that implementation, and the reference where it does not apply.
EFFVIT_ISA: the instruction set of the CPU library. EFFVIT_CUTLASS=0: no CUTLASS kernels.
EFFVIT_LIB_DIR: folder of the libraries instead of effvit/lib.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
REBUILD = "in effvit's source folder: pip install --no-build-isolation --force-reinstall --no-deps ."
MIN_CAPABILITY = (8, 0)


@dataclasses.dataclass
class Library:
    """A native library: loaded (handle), or the reason why not and what to do about it."""

    name: str
    path: Path | None = None
    handle: ctypes.CDLL | None = None
    reason: str = ""
    fix: str = ""

    @functools.cached_property
    def signatures(self) -> dict[str, str]:
        """{op: C++ signature, spelt like a schema} of the kernels in this library."""
        lines = text(self.handle, "effvit_abi_signatures").splitlines() if self.handle else ()
        return {line.split("(", 1)[0]: line for line in lines}


def text(handle: ctypes.CDLL, function: str) -> str:
    """What `const char* function()` of a library returns."""
    symbol = getattr(handle, function)
    symbol.restype = ctypes.c_char_p
    return symbol().decode()


LIBRARIES: dict[str, Library] = {}
TRITON_OPS: set[str] = set()
_TRITON_LIBRARY = None


def backend() -> str | None:
    """EFFVIT_BACKEND, or None when every implementation may run."""
    name = os.environ.get("EFFVIT_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"effvit: EFFVIT_BACKEND must be one of {', '.join(BACKENDS)}, got {name}")
    return name


def library_dir() -> Path:
    return Path(os.environ.get("EFFVIT_LIB_DIR") or Path(__file__).resolve().parent / "lib")


def library_path(name: str) -> Path | None:
    """lib<name>.so, or None where it was not built."""
    path = library_dir() / f"lib{name}.so"
    return path if path.is_file() else None


def build_status(name: str) -> str:
    """What the installation recorded about a library: how it was built, or `not built: <why>`."""
    try:
        return json.loads((library_dir() / "build.json").read_text()).get(name, "not built")
    except (OSError, ValueError):
        return "not built"


def fix_of_build(status: str) -> str:
    """What to type so that a part is built of which `build_status` says why it was not."""
    for cause, fix in (
        ("EFFVIT_CUTLASS", "leave -DEFFVIT_CUTLASS=OFF out of EFFVIT_CMAKE_ARGS, then "),
        ("CUTLASS", "pip install --no-deps 'nvidia-cutlass>=4.2', then "),
        ("compiler", "install a C++17 compiler (apt install g++), then "),
        ("nvcc", "install the CUDA toolkit 12.0 or later, then "),
        ("cmake", "pip install cmake ninja, then "),
        ("EFFVIT_NO_NATIVE", "unset EFFVIT_NO_NATIVE, then "),
        ("EFFVIT_BUILD_CUDA", "unset EFFVIT_NO_CUDA, then "),
        ("built for CUDA", "install a CUDA build of torch, then "),
    ):
        if cause in status:
            return fix + REBUILD
    return REBUILD


@functools.cache
def nvidia_driver() -> tuple[int, list[tuple[int, int]]] | None:
    """(CUDA version of the driver as 1000*major + 10*minor, compute capabilities), or None without a driver.

    From NVML, because asking CUDA itself would initialise it, and a process that has done so cannot fork.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return None
    except OSError:
        return None
    version, count, major, minor = (ctypes.c_int() for _ in range(4))
    nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version))
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    capabilities = []
    for i in range(count.value):
        device = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(i), ctypes.byref(device)) == 0:
            nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
            capabilities.append((major.value, minor.value))
    nvml.nvmlShutdown()
    return version.value, capabilities


def _cuda_obstacle() -> tuple[str, str]:
    """Why the CUDA library cannot run here, and the fix; ("", "") if nothing speaks against it."""
    if torch.version.cuda is None:
        built = "ROCm" if torch.version.hip else "CPU only"
        return f"this torch is built for {built}", "install a CUDA build of torch: pip install --force-reinstall torch"
    driver = nvidia_driver()
    if driver is None:
        return "", ""
    version, capabilities = driver
    status = build_status("effvit_cuda")
    toolkit, archs = re.match(r"nvcc (\d+)\.", status), re.findall(r"sm_(\d+a?)", status)
    if toolkit and version // 1000 < int(toolkit[1]):
        supported = f"{version // 1000}.{version % 1000 // 10}"
        reason = f"the NVIDIA driver is for CUDA {supported}, the library was built with CUDA {toolkit[1]}"
        return reason, f"update the NVIDIA driver, or build with CUDA {version // 1000}: {REBUILD}"
    if capabilities and min(capabilities) < MIN_CAPABILITY:
        found = ", ".join("{}.{}".format(*c) for c in capabilities)
        return f"needs compute capability 8.0 of every GPU, found {found}", "hide older GPUs with CUDA_VISIBLE_DEVICES"
    for capability in capabilities if archs else ():
        if not any(_runs_on(arch, capability) for arch in archs) and not ("PTX" in status and capability >= (9, 0)):
            built, found = status.split(", ", 1)[1], "sm_{}{}".format(*capability)
            return f"the library was built for {built}, a GPU is {found}", REBUILD
    return "", ""


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code runs there: on later minor versions as well, but that of 90a on none but 9.0."""
    major, minor = divmod(int(arch.rstrip("a")), 10)
    return (major, minor) == capability or (arch[-1] != "a" and major == capability[0] and minor < capability[1])


def _load_library(name: str, backend_name: str) -> Library:
    library = Library(name, library_path(name))
    status = build_status(name)
    if backend() not in (None, backend_name):
        library.reason, library.fix = f"EFFVIT_BACKEND={backend()}", "unset EFFVIT_BACKEND"
    elif name == "effvit_cuda" and (obstacle := _cuda_obstacle())[0]:
        library.reason, library.fix = obstacle
    elif library.path is None:
        library.reason = status if status.startswith("not built") else f"lib{name}.so is not in {library_dir()}"
        library.fix = fix_of_build(status)
    elif tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        library.reason, library.fix = f"torch {torch.__version__} is older than 2.11", "pip install 'torch>=2.11'"
    else:
        try:
            torch.ops.load_library(str(library.path))
            library.handle = ctypes.CDLL(str(library.path))
        except OSError as error:  # torch names the file, its cause the reason
            library.reason, library.fix = f"the loader refused it: {error.__cause__ or error}", fix_of_build(status)
    if name == "effvit_cpu" and library.handle is not None:
        _check_isas(library)
    return library


def _check_isas(library: Library) -> None:
    """A library for other machines is none; EFFVIT_ISA must be one that this one can use."""
    if not library.signatures:  # then it has registered nothing
        built = text(library.handle, "effvit_cpu_built_isas").replace(",", ", ")
        library.reason = f"this machine has none of the instruction sets that it was built for: {built}"
        library.handle, library.fix = None, REBUILD
    elif (forced := os.environ.get("EFFVIT_ISA")) and text(library.handle, "effvit_cpu_isa") != forced:
        usable = text(library.handle, "effvit_cpu_available_isas").replace(",", ", ")
        raise ValueError(f"effvit: EFFVIT_ISA must be one of {usable} (built, and this machine has it), got {forced}")


def triton_obstacle() -> tuple[str, str]:
    """Why the Triton kernels are not registered for CUDA tensors, and the fix; ("", "") if they could be."""
    if backend() not in (None, "triton"):
        return f"EFFVIT_BACKEND={backend()}", "unset EFFVIT_BACKEND"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed", "pip install triton"
    if not torch.backends.cuda.is_built():
        return "this torch is built for CPU only", "install a CUDA or ROCm build of torch"
    return "", ""


def triton_module(op: str) -> str | None:
    """Name of the module with the Triton launchers of an op (of a backward op: that of its forward), or None."""
    name = f"effvit.triton_kernels.{op.removesuffix('_backward')}"
    try:
        return name if importlib.util.find_spec(name) else None
    except ModuleNotFoundError:
        return None


def _triton_kernel(op: str, module: str):
    from .ops._op import OPS

    def kernel(*args, **kwargs):
        OPS[op].validate(*args, **kwargs)  # the launchers check nothing, and kernels would read what is not there
        launchers = importlib.import_module(module)  # triton is imported at the first call, not with effvit
        return (launchers.backward if op.endswith("_backward") else launchers.forward)(*args, **kwargs)

    return kernel


def _register_triton(ops: Iterator[str]) -> None:
    global _TRITON_LIBRARY
    if triton_obstacle()[0]:
        return
    _TRITON_LIBRARY = torch.library.Library("effvit", "IMPL")
    for op in ops:
        if op not in LIBRARIES["effvit_cuda"].signatures and (module := triton_module(op)):
            _TRITON_LIBRARY.impl(op, _triton_kernel(op, module), "CUDA")
            TRITON_OPS.add(op)


def load() -> dict[str, Library]:
    """Load what is there, once. A missing library is recorded in LIBRARIES, not reported."""
    if not LIBRARIES:
        from .ops._op import OPS

        LIBRARIES["effvit_cpu"] = _load_library("effvit_cpu", "cpu")
        LIBRARIES["effvit_cuda"] = _load_library("effvit_cuda", "cuda")
        _register_triton(iter(OPS))
    return LIBRARIES
