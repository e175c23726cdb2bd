"""The operator that csrc/README.md takes as its example: extracted from the page, built, put to the shared suite."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OP = "squared_relu"
# Without those that take a compiler or processes of their own and ask little of the example.
TESTS = " and not ".join(("TestSquaredRelu", "compile_inductor", "sharding", "no_leak", "peak_memory"))


def example_files():
    """{path: text} of the code blocks that follow a line which begins with the path of a file."""
    page = (ROOT / "csrc/README.md").read_text()
    files = {}
    for path, text in re.findall(r"^`([\w/.]*)`[^\n]*(?:\n(?!```|`)[^\n]*)*\n```\w+\n(.*?)^```$", page, re.M | re.S):
        if OP in path:
            assert path not in files, f"two blocks for {path}"
            files[path] = text
    return files


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources with the example added as the page says, and no other operator in C++."""
    copy = tmp_path_factory.mktemp("example")
    ignore = shutil.ignore_patterns("lib", "*.so", "__pycache__", "triton_kernels")
    for folder in ("csrc", "python", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    shutil.copytree(ROOT / "triton_kernels", copy / "python/effvit/triton_kernels")
    (copy / "triton_kernels").symlink_to(copy / "python/effvit/triton_kernels")
    for file in ("CMakeLists.txt", "pyproject.toml", ".clang-format"):
        shutil.copy(ROOT / file, copy)
    for op in (path.stem for path in (copy / "python/effvit/ops").glob("[a-z]*.py")):
        for path in (f"csrc/rows/{op}.h", f"csrc/cpu/{op}_kernel.inl.h", f"csrc/cuda/{op}.cu"):
            (copy / path).unlink(missing_ok=True)
    for path, text in example_files().items():
        assert not (copy / path).exists(), f"{path} exists already"
        (copy / path).write_text(text)
    for package in ("ops", "reference"):
        with open(copy / f"python/effvit/{package}/__init__.py", "a") as file:
            file.write(f'\nfrom .{OP} import {OP}\n__all__.append("{OP}")\n')
    return copy


def run(command, cwd, **environment):
    environment = {**os.environ, "PYTHONPATH": f"{cwd}/python", "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
    return done.stdout


def program(name):
    """A program of the environment, or of the machine."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def test_the_page_has_a_file_for_every_layer():
    from layout import LAYERS, ROWS, ROWS_STAND_FOR

    files = [path for layer, path in LAYERS.items() if layer not in (*ROWS_STAND_FOR, "benchmark")]
    wanted = {path.format(op=OP) for path in (*files, ROWS)}
    assert wanted == set(example_files())


@pytest.fixture(scope="module")
def libraries(tree):
    """effvit_cpu, for this machine's instruction set, and effvit_emu, with the example as their only operator."""
    cmake, ninja = program("cmake"), program("ninja")
    if cmake is None or ninja is None or shutil.which("c++") is None:
        pytest.skip("needs cmake, ninja and a C++ compiler")
    options = {"Python_EXECUTABLE": sys.executable, "CMAKE_MAKE_PROGRAM": ninja, "EFFVIT_ISAS": "native"}
    options |= {"EFFVIT_BUILD_EMU": "ON", "EFFVIT_BUILD_CUDA": "OFF"}
    # -O1: what is tested is small, and compiled twice as fast.
    options |= {"CMAKE_CXX_FLAGS_RELEASE": "-O1 -Werror"}
    build = tree / "build"
    run([cmake, "-S", tree, "-B", build, "-G", "Ninja", *(f"-D{name}={x}" for name, x in options.items())], tree)
    run([cmake, "--build", build, "--parallel", "2"], tree)
    return tree / "python/effvit/lib"


def test_the_example_passes_its_tests(tree, libraries):
    """The shared suite: the CPU kernel, the emulator, the Triton interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-rs", "-k", TESTS]
    out = run(
        [*command, "tests/ops/test_declared.py"], tree,
        EFFVIT_LIB_DIR=str(libraries), EFFVIT_BACKEND="cpu", TRITON_INTERPRET="1",
    )  # fmt: skip
    print(out[-3000:])
    wanted = ["cpu", "emu", *(["triton"] if importlib.util.find_spec("triton") else [])]
    assert re.search(r"\d+ passed", out) and not re.search(rf"[:;] ({'|'.join(wanted)}): ", out)


def test_the_example_is_formatted(tree):
    python = [path for path in example_files() if path.endswith(".py")]
    run([sys.executable, "-m", "ruff", "check", *python], tree)
    run([sys.executable, "-m", "ruff", "format", "--check", *python], tree)
    native = [path for path in example_files() if not path.endswith(".py")]
    run([program("clang-format"), "--dry-run", "-Werror", *native], tree)
