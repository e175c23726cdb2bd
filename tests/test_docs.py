"""The operator that csrc/README.md takes as its example: extracted from the page, compiled, put to its own tests."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
OP = "relu_scale"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fvisibility=hidden"]
KINDS = (
    "generic", "avx2", "avx512", "avx512_bf16", "amx", "avx512_emulated", "avx512_bf16_emulated", "amx_emulated",
)  # fmt: skip


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
    """A copy of the sources with the example added as the page says."""
    copy = tmp_path_factory.mktemp("example")
    ignore = shutil.ignore_patterns("lib", "*.so", "__pycache__")
    for folder in ("csrc", "python", "triton_kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "python/effvit/triton_kernels").symlink_to(copy / "triton_kernels")
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


def test_the_page_has_a_file_for_every_layer():
    from layout import LAYERS

    wanted = {path.format(op=OP) for path in LAYERS.values()}
    assert wanted <= set(example_files()), wanted - set(example_files())


@pytest.fixture(scope="module")
def libraries(tree):
    """effvit_cpu and effvit_emu with the example as their only operator."""
    if sys.platform != "linux" or os.uname().machine != "x86_64" or shutil.which("g++") is None:
        pytest.skip("needs g++ on x86-64 Linux")
    include = ["-I", "csrc", "-isystem", f"{torch.__path__[0]}/include", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    cpu = ["-DEFFVIT_TEST_ISAS", "-DEFFVIT_NAMESPACE=effvit", "-DEFFVIT_DISPATCH_KEY=CPU", '-DEFFVIT_LIBRARY="example"']
    emu = ["-DEFFVIT_EMU", "-DEFFVIT_NAMESPACE=effvit_emu", "-DEFFVIT_DISPATCH_KEY=CPU", '-DEFFVIT_LIBRARY="example"']
    build = tree / "build"
    build.mkdir()
    jobs = []
    for isa in KINDS:
        lines = (f"EFFVIT_ISA_{isa.upper()}", f'EFFVIT_KERNEL_HEADER "../{OP}_kernel.inl.h"',
                 f'EFFVIT_KERNEL_DECLARATIONS "../{OP}.h"')  # fmt: skip
        source = "".join(f"#define {line}\n" for line in lines) + '#include "cpu/isa/instantiate.cpp"\n'
        (build / f"cpu_{isa}.cpp").write_text(source)
        jobs.append((f"cpu_{isa}", build / f"cpu_{isa}.cpp", cpu))
    for path in (f"cpu/{OP}.cpp", "cpu/abi.cpp", "cpu/isa/isa.cpp"):
        jobs.append((f"cpu_{Path(path).stem}", tree / "csrc" / path, cpu))
    for path in (f"cuda/{OP}.cu", "cuda/abi.cu", "emu/emulator.cpp"):
        (build / f"emu_{Path(path).stem}.cpp").write_text(f'#include "{path}"\n')
        jobs.append((f"emu_{Path(path).stem}", build / f"emu_{Path(path).stem}.cpp", emu))
    with ThreadPoolExecutor(2) as pool:
        commands = [["g++", *FLAGS, *include, *d, "-c", source, "-o", build / f"{name}.o"] for name, source, d in jobs]
        list(pool.map(lambda command: run(command, tree), commands))
    link = [f"{torch.__path__[0]}/lib/libtorch_cpu.so", "-lstdc++"]
    for name in ("cpu", "emu"):
        objects = [build / f"{job}.o" for job, _, _ in jobs if job.startswith(name)]
        run(["g++", "-shared", *objects, *link, "-o", build / f"libeffvit_{name}.so"], tree)
    return build


def test_the_example_passes_its_tests(tree, libraries):
    """The whole shared suite of an operator: the CPU kernel on every ISA, the emulator, the Triton interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-rs"]
    out = run([*command, f"tests/ops/test_{OP}.py"], tree, EFFVIT_LIB_DIR=str(libraries), EFFVIT_BACKEND="cpu")
    print(out[-3000:])
    assert re.search(r"\d+ passed", out) and "effvit_emu is not built" not in out


def test_the_example_is_formatted(tree):
    files = [path for path in example_files() if path.endswith(".py")]
    run([sys.executable, "-m", "ruff", "check", *files], tree)
    native = [path for path in example_files() if not path.endswith(".py") and "benchmarks" not in path]
    beside = Path(sys.executable).parent / "clang-format"
    shutil.copy(ROOT / ".clang-format", tree)
    run([beside if beside.exists() else "clang-format", "--dry-run", "-Werror", *native], tree)
