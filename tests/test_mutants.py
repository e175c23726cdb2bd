"""Mutated CUDA kernels must be caught in the emulator: by an error of its own, or by a wrong result.

A test that cannot fail proves nothing. Every mutant in tests/prim/*_mutants.py is a plausible mistake, compiled against
the emulator and run in a process of its own; the unmutated sources, compiled the same way, are right.
"""

import concurrent.futures
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PRIM = ROOT / "tests" / "prim"
RUNNER = PRIM / "run_mutant.py"

sys.path.insert(0, str(PRIM))  # run_mutant.py finds the modules likewise
PROGRAMS = {
    path.name.removesuffix("_mutants.py"): importlib.import_module(path.stem)
    for path in sorted(PRIM.glob("*_mutants.py"))
}
MUTANTS = [(program, m) for program, module in PROGRAMS.items() for m in module.MUTANTS]


def ccache():
    return ["ccache"] if shutil.which("ccache") else []


def compile_and_run(folder, program, mutant=None):
    """Compiles a copy of the sources with the mutant in it, runs it: (error message, results)."""
    source = folder / "csrc"
    for part in ("cuda", "common", "emu"):
        shutil.copytree(ROOT / "csrc" / part, source / part)
    if mutant is not None:
        path = folder / mutant.file
        text = path.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.name}: its text occurs {text.count(mutant.old)} times"
        path.write_text(text.replace(mutant.old, mutant.new))
    harness = PROGRAMS[program].HARNESS
    main = (folder if harness.startswith("csrc/") else ROOT) / harness
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-fvisibility=hidden", "-DEFFVIT_EMU", "-I", source]
    env = {**os.environ, "CCACHE_BASEDIR": str(folder), "CCACHE_NOHASHDIR": "1"}
    objects = []
    for i, file in enumerate((main, source / "emu" / "emulator.cpp")):
        objects.append(folder / f"{i}.o")
        command = [*ccache(), "g++", *flags, "-x", "c++", "-c", file, "-o", objects[-1]]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            return "does not compile: " + done.stderr, None
    library, results = folder / "mutant.so", folder / "results.npz"
    subprocess.run(["g++", "-shared", *objects, "-o", library], check=True, cwd=folder)
    command = [sys.executable, RUNNER, program, library, results]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        return done.stdout + done.stderr, None
    return "", dict(np.load(results))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All programs, two at a time: {name: (error message, results)}."""
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    jobs = {name: (name, None) for name in PROGRAMS}
    jobs |= {f"{program}_{m.name}": (program, m) for program, m in MUTANTS}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = {
            name: pool.submit(compile_and_run, tmp_path_factory.mktemp(name), *job) for name, job in jobs.items()
        }
        return {name: future.result() for name, future in futures.items()}


def error(got, expected):
    return np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)


@pytest.mark.parametrize("program", PROGRAMS)
def test_unmutated(outcomes, program):
    message, results = outcomes[program]
    assert message == ""
    PROGRAMS[program].check(results)


@pytest.mark.parametrize(("program", "mutant"), MUTANTS, ids=[f"{program}-{m.name}" for program, m in MUTANTS])
def test_mutant_is_caught(outcomes, program, mutant):
    message, results = outcomes[f"{program}_{mutant.name}"]
    if mutant.by:
        assert results is None, "the emulator did not notice"
        assert "emulator: " in message, message
        assert any(part in message for part in mutant.by.split("|")), message
        return
    assert results is not None, message
    correct = outcomes[program][1]
    wrong = [name for name, x in results.items() if not error(x, correct[name]) < 0.02]
    assert wrong, "every result is right"
