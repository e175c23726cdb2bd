"""benchmarks/gpu.sh on a machine without a GPU: its selections of tests find tests, its benchmarks take its options."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from effvit.ops._op import OPS
from effvit.testing import get_spec
from layout import WAIVERS

ROOT = Path(__file__).resolve().parent.parent
OP_NAMES = [name for name, op in OPS.items() if op.backward_of is None]
ON_GPU = {
    backend: [op for op in OP_NAMES if (op, layer) not in WAIVERS]
    for backend, layer in (("cuda", "cuda kernel"), ("triton", "triton"))
}
PRETEND_GPU = '''"""Collects what a machine with a GPU and the CUDA library would."""
import torch

from effvit.ops._op import OPS
from effvit.testing import _backends

really = _backends.has_native_kernel
torch.cuda.is_available = lambda: True
_backends.has_native_kernel = lambda op, device="cpu": op in OPS if device == "cuda" else really(op, device)
'''


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """What the script would run, as lists of arguments."""
    if shutil.which("bash") is None:
        pytest.skip("bash was not found")
    environment = {**os.environ, "OUT": str(tmp_path_factory.mktemp("out")), "PYTHON": sys.executable}
    environment.pop("OPS", None)
    done = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", "--dry-run"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]


def collected(tmp_path, arguments):
    """The tests that pytest would run where there is a GPU."""
    (tmp_path / "pretend_gpu.py").write_text(PRETEND_GPU)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "pretend_gpu", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return [line for line in done.stdout.splitlines() if re.match(r"tests/\S+\.py::", line)]


def selections(commands):
    """The options of every pytest, for `tests` and under the sanitizer: (whole suite, [one per op])."""
    pytests = [c for c in commands if "pytest" in c]
    sanitized = [c[c.index("pytest") + 1 :] for c in pytests if "compute-sanitizer" in c]
    (suite,) = (c[c.index("pytest") + 1 :] for c in pytests if "compute-sanitizer" not in c)
    return suite, sanitized


@pytest.mark.slow
def test_suite_selection(commands, tmp_path):
    tests = collected(tmp_path, selections(commands)[0])
    for backend, ops in ON_GPU.items():
        for op in ops:
            for test in ("test_results", "test_repeats_are_equal"):
                found = [t for t in tests if t.startswith(f"tests/ops/test_{op}.py::") and f"::{test}[" in t]
                assert any(t.endswith(f"-{backend}]") for t in found), (op, test, backend)
    assert any(t.startswith("tests/prim/test_prim.py::") and "cuda" in t for t in tests)
    assert not any(t.startswith("tests/ops/") and t.endswith("-emu]") for t in tests)


@pytest.mark.slow
def test_sanitizer_selection(commands, tmp_path):
    """One process per op; they differ in nothing but the file, so that one collection is enough."""
    sanitized = selections(commands)[1]
    assert len({tuple(arguments[:-1]) for arguments in sanitized}) == 1
    files = [arguments[-1] for arguments in sanitized]
    assert sorted(files) == sorted(f"tests/ops/test_{op}.py" for op in ON_GPU["cuda"])
    tests = collected(tmp_path, [*sanitized[0][:-1], *files])
    for op in ON_GPU["cuda"]:
        found = [t for t in tests if t.startswith(f"tests/ops/test_{op}.py::")]
        for dtype in {str(d).removeprefix("torch.") for s in get_spec(op).samples for d in s.dtypes}:
            assert any("::test_results[small" in t and t.endswith(f"-{dtype}-cuda]") for t in found), (op, dtype)
    assert all("cuda" in t and "small" in t for t in tests)


def test_benchmarks_take_the_options(commands):
    benches = [c[1:] for c in commands if len(c) > 1 and c[1].startswith("benchmarks/bench_")]
    assert sorted(c[0] for c in benches) == sorted(f"benchmarks/{p.name}" for p in ROOT.glob("benchmarks/bench_*.py"))
    # In a process of its own: the harness pins its CPUs and threads when it is imported.
    parse = "import harness, json, sys; print({harness.parse(a).device for a in json.load(sys.stdin)})"
    arguments = json.dumps([arguments for _, *arguments in benches])
    done = subprocess.run(
        [sys.executable, "-c", parse], cwd=ROOT / "benchmarks", input=arguments, capture_output=True, text=True
    )
    assert done.stdout == "{'cuda'}\n", done.stderr


def test_microbenchmarks_are_built_and_sanitized(commands):
    sources = [c[-1] for c in commands if c[0] == "nvcc"]
    assert sorted(sources) == sorted(f"csrc/bench/{p.name}" for p in (ROOT / "csrc" / "bench").glob("bench_*.cu"))
    built = {c[c.index("-o") + 1] for c in commands if c[0] == "nvcc"}
    tools = {"memcheck", "racecheck", "initcheck", "synccheck"}
    found = {(c[c.index("--tool") + 1], c[-2]) for c in commands if "compute-sanitizer" in c and c[-1] == "--smoke"}
    assert found == {(tool, program) for tool in tools for program in built}
