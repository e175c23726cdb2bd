"""Installing a copy of the sources: with a compiler but no nvcc, without any compiler, and as a wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from effvit.ops._op import OPS

ROOT = Path(__file__).resolve().parent.parent
CALL = """
import sys, torch, effvit
assert effvit.__file__.startswith(sys.argv[1]), effvit.__file__
import effvit.triton_kernels, effvit.layers
x = torch.randn(7, 8)
torch.testing.assert_close(effvit.glu(x), torch.nn.functional.glu(x))
from effvit import _backends
print(_backends.chosen("glu", "cpu").name)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what a clone would contain, with the native code of one operator: more would only take longer."""
    copy = tmp_path_factory.mktemp("effvit")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    others = [f"{op}*" for op in OPS if op != "glu" and OPS[op].backward_of is None]
    for name in ("csrc", "python", "triton_kernels"):
        ignore = shutil.ignore_patterns(
            "*.so", "lib", "__pycache__", "*.egg-info", *(others if name == "csrc" else ())
        )  # fmt: skip
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


def environment(**changes):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("EFFVIT_")}
    return {**kept, **changes}


def install(sources, target, command="install", **changes):
    """`pip install` into a folder; what it printed."""
    where = ["--target", str(target)] if command == "install" else ["--wheel-dir", str(target)]
    pip = [sys.executable, "-m", "pip", command, "-v", "--no-build-isolation", "--no-deps", "--no-index", *where, "."]
    done = subprocess.run(pip, cwd=sources, env=environment(**changes), capture_output=True, text=True)
    printed = done.stdout + done.stderr  # pip passes on what setup.py prints as its own messages
    assert done.returncode == 0, printed[-6000:]
    return printed


def python(target, *command):
    done = subprocess.run(
        [sys.executable, *command], cwd=target, env=environment(PYTHONPATH=str(target)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_compiler(sources, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    target = tmp_path / "target"
    printed = install(sources, target, PATH=str(empty), CXX="", CC="")
    assert "effvit_cpu   not built: no C++ compiler was found" in printed
    assert "pure Python: Triton kernels on a GPU, reference kernels in PyTorch elsewhere" in printed
    assert not list(target.rglob("*.so"))
    assert python(target, "-c", CALL, str(target)) == "reference\n"
    info = python(target, "-m", "effvit", "info")
    assert "effvit_cpu    not loaded: not built: no C++ compiler was found" in info
    assert "effvit_cpu    install a C++17 compiler" in info


@pytest.mark.skipif(shutil.which("c++") is None or shutil.which("cmake") is None, reason="needs a compiler and cmake")
def test_without_nvcc_as_a_wheel(sources, tmp_path):
    """Without optimisation and for one instruction set: this is about what is built and found."""
    options = (
        "-DEFFVIT_NVCC= -DEFFVIT_ISAS=native -DCMAKE_CXX_FLAGS_RELEASE=-O0"  # an empty EFFVIT_NVCC: CMake found none
    )
    printed = install(sources, tmp_path, "wheel", EFFVIT_CMAKE_ARGS=options)
    assert "effvit_cuda  not built: nvcc was not found" in printed
    (wheel,) = tmp_path.glob("effvit-*.whl")
    target = tmp_path / "target"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(target)
    assert "effvit/lib/libeffvit_cpu.so" in names
    assert not [n for n in names if "_emu." in n or "_cuda." in n or n.startswith(("csrc", "tests", "build"))]
    assert python(target, "-c", CALL, str(target)) == "cpu\n"
    info = python(target, "-m", "effvit", "info")
    assert "effvit_cpu    loaded; built with" in info
    assert "effvit_cuda   not loaded: " in info
