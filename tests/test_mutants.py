"""Mutated CUDA kernels must be caught in the emulator: by an error of its own, or by a wrong result.

A test that cannot fail proves nothing. Every mutant in tests/prim/*_mutants.py is a plausible mistake, compiled against
the emulator and run in a process of its own; the unmutated sources, compiled the same way, are right.
"""

import functools
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import random_calls

from effvit.ops._op import OPS
from layout import WAIVERS

ROOT = Path(__file__).resolve().parent.parent
PRIM = ROOT / "tests" / "prim"
RUNNER = PRIM / "run_mutant.py"

sys.path.insert(0, str(PRIM))  # run_mutant.py finds the modules likewise
PROGRAMS = {
    path.name.removesuffix("_mutants.py"): importlib.import_module(path.stem)
    for path in sorted(PRIM.glob("*_mutants.py"))
}
EVERYTHING = os.environ.get("EFFVIT_TEST_ALL", "0") not in ("", "0")
PARTS = (
    1 if EVERYTHING else 3
)  # compiling them takes minutes: every run takes every third, another third with each commit
MUTANTS = [
    (program, m)
    for program, module in PROGRAMS.items()
    for i, m in enumerate(module.MUTANTS)
    if (i + random_calls.seed()) % PARTS == 0
]


def compiled(source, include, to, level="-O0"):
    """What the compiler says where it refuses, else nothing. Compiling a mutant takes longer than running it."""
    ccache = ["ccache"] if shutil.which("ccache") else []
    flags = ["-std=c++17", level, "-w", "-fPIC", "-fvisibility=hidden", "-DEFFVIT_EMU", "-I", include]
    done = subprocess.run(
        [*ccache, "g++", *flags, "-x", "c++", "-c", source, "-o", to],
        env={**os.environ, "CCACHE_BASEDIR": str(to.parent), "CCACHE_NOHASHDIR": "1"},
        cwd=to.parent, capture_output=True, text=True,
    )  # fmt: skip
    return done.stderr if done.returncode != 0 else ""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The emulator's object files, which no mutant changes."""
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    folder, objects = tmp_path_factory.mktemp("emulator"), []
    for source in sorted((ROOT / "csrc" / "emu").glob("*.cpp")):
        objects.append(folder / f"{source.stem}.o")
        assert compiled(source, ROOT / "csrc", objects[-1], "-O2") == ""
    return objects


def compile_and_run(folder, emulator, program, mutant=None):
    """Compiles a copy of the sources with the mutant in it, runs it: (error message, results)."""
    source = folder / "csrc"
    for part in ("cuda", "common", "emu", "rows"):
        shutil.copytree(ROOT / "csrc" / part, source / part)
    if mutant is not None:
        path = folder / mutant.file
        assert path.is_relative_to(source / "cuda") or path.is_relative_to(source / "rows"), mutant.file
        text = path.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.name}: its text occurs {text.count(mutant.old)} times"
        path.write_text(text.replace(mutant.old, mutant.new))
    harness = PROGRAMS[program].HARNESS
    main, program_object = (folder if harness.startswith("csrc/") else ROOT) / harness, folder / "program.o"
    message = compiled(main, source, program_object)
    if message:
        return "does not compile: " + message, None
    library, results = folder / "mutant.so", folder / "results.npz"
    subprocess.run(["g++", "-shared", program_object, *emulator, "-o", library], check=True, cwd=folder)
    command = [sys.executable, RUNNER, program, library, results]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        return done.stdout + done.stderr, None
    return "", dict(np.load(results))


@pytest.fixture(scope="module")
def unmutated(tmp_path_factory, emulator):
    """(program) -> (error message, results), computed once."""
    return functools.cache(lambda program: compile_and_run(tmp_path_factory.mktemp(program), emulator, program))


def error(got, expected):
    return np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)


def test_every_op_has_mutants():
    row_wise = {path.stem for path in (ROOT / "csrc" / "rows").glob("*.h")}
    names = {name for name, op in OPS.items() if op.backward_of is None and (name, "cuda kernel") not in WAIVERS}
    served = {op for program, module in PROGRAMS.items() for op in getattr(module, "OPS", (program,))}
    assert served == (names - row_wise) | {"prim", "rows", "int_rows"}
    for program, module in PROGRAMS.items():
        assert len(module.MUTANTS) >= 5, program
        assert len({m.name for m in module.MUTANTS}) == len(module.MUTANTS), program


@pytest.mark.parametrize("program", PROGRAMS)
def test_unmutated(unmutated, program):
    message, results = unmutated(program)
    assert message == ""
    PROGRAMS[program].check(results)


@pytest.mark.parametrize(("program", "mutant"), MUTANTS, ids=[f"{program}-{m.name}" for program, m in MUTANTS])
def test_mutant_is_caught(unmutated, emulator, tmp_path, program, mutant):
    message, results = compile_and_run(tmp_path, emulator, program, mutant)
    if mutant.by:
        assert results is None, "the emulator did not notice"
        assert "emulator: " in message, message
        assert any(part in message for part in mutant.by.split("|")), message
        return
    assert results is not None, message
    correct = unmutated(program)[1]
    wrong = [name for name, x in results.items() if not error(x, correct[name]) < 0.02]
    assert wrong, "every result is right"
