"""Installing a copy of the sources: without a compiler, without nvcc, for another machine; what is built by default."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from effvit import _backends
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


def wheel(sources, folder, options):
    """(what pip printed, path of the wheel, folder with its contents)"""
    # Without optimisation: this is about what is built and found.
    printed = install(sources, folder, "wheel", EFFVIT_CMAKE_ARGS=f"{options} -DCMAKE_CXX_FLAGS_RELEASE=-O0")
    (path,) = folder.glob("effvit-*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "target")
    return printed, path, folder / "target"


needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("cmake") is None, reason="needs a compiler and cmake"
)


def test_without_compiler(sources, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    target = tmp_path / "target"
    printed = install(sources, target, PATH=str(empty), CXX="", CC="")
    assert "effvit_cpu   not built: no C++ compiler was found" in printed
    assert "pure Python: Triton kernels on a GPU, reference kernels in PyTorch elsewhere" in printed
    assert not list(target.rglob("*.so"))
    (tags,) = target.glob("effvit-*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in tags.read_text().splitlines()
    assert python(target, "-c", CALL, str(target)) == "reference\n"
    info = python(target, "-m", "effvit", "info")
    assert "effvit_cpu    not loaded: not built: no C++ compiler was found" in info
    assert "effvit_cpu    install a C++17 compiler" in info


@needs_compiler
def test_without_nvcc_as_a_wheel(sources, tmp_path):
    # An empty EFFVIT_NVCC: CMake found none.
    printed, path, target = wheel(sources, tmp_path, "-DEFFVIT_BUILD_CUDA=ON -DEFFVIT_NVCC=")
    assert "effvit_cuda  not built: nvcc was not found" in printed
    assert path.name.endswith(f"-py3-none-{sysconfig.get_platform().replace('-', '_')}.whl")
    names = [str(p.relative_to(target)) for p in target.rglob("*")]
    assert [n for n in names if n.endswith(".so")] == ["effvit/lib/libeffvit_cpu.so"]
    assert not [n for n in names if n.startswith(("csrc", "tests", "build"))]
    assert python(target, "-c", CALL, str(target)) == "cpu\n"
    info = python(target, "-m", "effvit", "info")
    (native,) = re.findall(r"^  ISA +(\w+) of \1$", info, re.M)  # this machine's best, and no other
    assert re.search(rf"^  effvit_cpu    loaded; built with .*, {native}$", info, re.M)
    assert "effvit_cuda   not loaded: " in info


@needs_compiler
def test_for_another_machine(sources, tmp_path):
    """Kernels that this machine cannot run: the reference runs, and says why."""
    other = "amx_emulated" if "amx_tile" in _backends.cpu_features() else "amx"  # the former is only chosen by name
    _, _, target = wheel(sources, tmp_path, f"-DEFFVIT_BUILD_CUDA=OFF -DEFFVIT_ISAS={other}")
    assert python(target, "-c", CALL, str(target)) == "reference\n"
    info = python(target, "-m", "effvit", "info")
    lacks = f"this machine has none of the instruction sets that it was built for: {other}"
    assert f"effvit_cpu    not loaded: {lacks}; built with" in info
    assert f"glu on cpu: reference\n    not cpu: {lacks}\n" in info
    assert "effvit_cpu    in effvit's source folder: pip install" in info


def configured(sources, tmp_path, *options, **changes):
    """What CMake would build: status.txt, as a dict."""
    torch = tmp_path / "torch"
    torch.mkdir(exist_ok=True)
    options = (f"-DEFFVIT_TORCH_DIR={torch}", f"-DEFFVIT_PACKAGE_DIR={tmp_path}", *options)
    command = ["cmake", "--fresh", "-S", str(sources), "-B", str(tmp_path / "build"), *options]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split("=", 1) for line in (tmp_path / "build" / "status.txt").read_text().splitlines())


@needs_compiler
def test_cuda_is_built_by_default_where_torch_has_it(sources, tmp_path):
    status = configured(sources, tmp_path, "-DEFFVIT_NVCC=")
    assert status["effvit_cuda"] == "not built: torch was not built for CUDA"
    (tmp_path / "torch/lib").mkdir()
    (tmp_path / "torch/lib/libtorch_cuda.so").touch()
    status = configured(sources, tmp_path, "-DEFFVIT_NVCC=")
    assert status["effvit_cuda"] == "not built: nvcc was not found"


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    "capabilities, archs",
    [("9.0", "sm_90a"), ("8.9\n9.0", "sm_80, sm_90a"), ("12.0", "sm_80, sm_90a"), ("", "sm_80, sm_90a")],
    ids=["sm_90", "two", "newer", "none"],
)
def test_machine_code_is_built_by_default_for_the_gpus_here(sources, tmp_path, capabilities, archs):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n[ \"$1\" = --query-gpu=compute_cap ] && echo '{capabilities}'\n")
    smi.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    status = configured(sources, tmp_path, "-DEFFVIT_BUILD_CUDA=ON", "-DEFFVIT_ISAS=generic", PATH=path)
    assert re.fullmatch(rf"nvcc [\d.]+, {archs} and compute_90 PTX", status["effvit_cuda"])


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cutlass_is_built_where_its_headers_are(sources, tmp_path):
    headers = tmp_path / "cutlass/include/cutlass"
    headers.mkdir(parents=True)

    def status(version, *options, **changes):
        lines = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
        (headers / "version.h").write_text("".join(f"#define CUTLASS_{part} {number} \n" for part, number in lines))
        options = ("-DEFFVIT_BUILD_CUDA=ON", "-DEFFVIT_ISAS=generic", "-DEFFVIT_CUDA_ARCHS=80;90a", *options)
        return configured(sources, tmp_path, *options, **{"CUTLASS_PATH": "", **changes})["cutlass"]

    found = f"-DEFFVIT_CUTLASS={tmp_path}/cutlass"
    assert status("4.2.1") == "not built: CUTLASS was not found"
    assert status("4.2.1", "-DEFFVIT_CUTLASS=OFF") == "not built: EFFVIT_CUTLASS is off"
    assert status("3.9.2", found) == "not built: CUTLASS 3.9.2 is older than 4.2"
    outputs = "-DEFFVIT_CUTLASS_OUTPUTS=float16;int8"
    assert status("4.2.1", found, outputs) == "CUTLASS 4.2.1, sm_80, sm_90a (outputs float16 int8)"
    assert status("4.10.0", outputs, CUTLASS_PATH=f"{tmp_path}/cutlass").startswith("CUTLASS 4.10.0, ")
    assert status("4.2.1", found, "-DEFFVIT_CUDA_ARCHS=86") == "CUTLASS 4.2.1, sm_86"
