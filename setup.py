"""Builds the native libraries with CMake and places them in the package; metadata is in pyproject.toml.

EFFVIT_NO_NATIVE=1: pure Python. EFFVIT_NO_CUDA=1: no CUDA library. EFFVIT_CMAKE_ARGS: more configure arguments.
What is built is for this machine; for others: EFFVIT_CMAKE_ARGS="-DEFFVIT_ISAS=real -DEFFVIT_CUDA_ARCHS=all".
Without a compiler, CMake or torch the package is pure Python (Triton and reference kernels) and the summary says so.
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Distribution, find_packages, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"effvit: the build needs setuptools 77, got {setuptools.__version__}: pip install 'setuptools>=77'")

from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
NATIVE = ("effvit_cpu", "effvit_cuda")
OF_BUILD = (*NATIVE, "cutlass")


def find_torch():
    """Folder of torch: importable here, or installed in the environment that pip's isolated build is for."""
    spec = importlib.util.find_spec("torch")
    places = list(spec.submodule_search_locations) if spec else []
    places += [os.path.join(sysconfig.get_path(kind), "torch") for kind in ("purelib", "platlib")]
    has_headers = (
        place for place in places if os.path.isdir(os.path.join(place, "include", "torch", "csrc", "stable"))
    )
    return next(has_headers, None)


def find_cutlass():
    """Folder of CUTLASS's headers in the package nvidia-cutlass, importable here or in the environment built for."""
    spec = importlib.util.find_spec("cutlass_library")
    places = list(spec.submodule_search_locations) if spec else []
    places += [os.path.join(sysconfig.get_path(kind), "cutlass_library") for kind in ("purelib", "platlib")]
    return next((f"{place}/source" for place in places if os.path.isdir(f"{place}/source/include/cutlass")), "")


def find_program(name):
    """A program on PATH or from the wheel of that name."""
    found = shutil.which(name)
    if found is None and (spec := importlib.util.find_spec(name)):
        inside = Path(spec.submodule_search_locations[0]) / "data" / "bin" / name
        beside = Path(sys.executable).parent / name
        found = next((str(place) for place in (inside, beside) if place.exists()), None)
    return found


def find_compiler():
    return next(filter(None, map(shutil.which, [os.environ.get("CXX") or "c++", "g++", "clang++"])), None)


def is_set(variable):
    return os.environ.get(variable, "0") not in ("", "0")


def obstacle():
    """Why nothing native can be built; None if it can."""
    if is_set("EFFVIT_NO_NATIVE"):
        return "EFFVIT_NO_NATIVE is set"
    if find_compiler() is None:
        return "no C++ compiler was found"
    if find_torch() is None:
        return "torch >= 2.11 is not installed; install it first, then install effvit again"
    if find_program("cmake") is None:
        return "cmake was not found (pip install cmake)"
    return None


class CMakeDistribution(Distribution):
    def has_ext_modules(self):  # so that build_ext runs, and builds for this platform are kept apart
        return True


class Wheel(bdist_wheel):
    """For every Python: the libraries are loaded with dlopen and do not touch Python's ABI."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = obstacle() is not None

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


class CMakeBuild(build_ext):
    def run(self):
        package = ROOT / "python" / "effvit" if self.inplace else Path(self.build_lib).resolve() / "effvit"
        build = ROOT / "build" / "cmake" if self.inplace else Path(self.build_temp).resolve() / "cmake"
        missing = obstacle()
        if missing:
            status = dict.fromkeys(OF_BUILD, f"not built: {missing}")
        else:
            cmake, ninja = find_program("cmake"), find_program("ninja")
            if not self.inplace:  # options of an earlier build must not stay
                (build / "CMakeCache.txt").unlink(missing_ok=True)
            configure = [cmake, "-S", str(ROOT), "-B", str(build)]
            configure += [f"-DEFFVIT_TORCH_DIR={find_torch()}", f"-DEFFVIT_PACKAGE_DIR={package}"]
            configure += [f"-DEFFVIT_CUTLASS_WHEEL={find_cutlass()}"]
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
            configure += [f"-DEFFVIT_BUILD_CUDA={'OFF' if is_set('EFFVIT_NO_CUDA') else 'AUTO'}"]
            configure += shlex.split(os.environ.get("EFFVIT_CMAKE_ARGS", ""))
            make = [cmake, "--build", str(build), "--parallel", str(self.parallel or os.cpu_count())]
            for command in (configure, make + (["--", "-k", "0"] if ninja else [])):
                if subprocess.run(command).returncode:
                    self.record(package, dict.fromkeys(OF_BUILD, "not built: the build failed"))
                    sys.exit("effvit: the native build failed, see above; EFFVIT_NO_NATIVE=1 installs without it")
            status = dict(line.split("=", 1) for line in (build / "status.txt").read_text().split("\n") if line)
        self.record(package, status)
        print("effvit: built by this installation", flush=True)
        for name, how in status.items():
            print(f"  {name:12} {how}")
        if missing:
            print("  pure Python: Triton kernels on a GPU, reference kernels in PyTorch elsewhere", flush=True)

    def record(self, package, status):
        """For `python -m effvit info`; what was not built must not be left over from an earlier build."""
        (package / "lib").mkdir(parents=True, exist_ok=True)
        for name, how in status.items():
            if name in NATIVE and how.startswith("not built") and "build failed" not in how:
                (package / "lib" / f"lib{name}.so").unlink(missing_ok=True)
        (package / "lib" / "build.json").write_text(json.dumps(status, indent=1) + "\n")

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    packages=[*find_packages("python"), "effvit.triton_kernels"],
    distclass=CMakeDistribution,
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
