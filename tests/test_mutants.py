"""Mutated CUDA kernels must be caught in the emulator: by an error of its own, or by a wrong result.

A test that cannot fail proves nothing. Every mutant below is a plausible mistake, compiled against the emulator and run
in a process of its own; the unmutated sources, compiled the same way, are right.
"""

import concurrent.futures
import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from effvit.reference.window_attention import window_attention
from effvit.testing import assert_close_to_truth

ROOT = Path(__file__).resolve().parent.parent
RUNNER = ROOT / "tests" / "prim" / "run_mutant.py"
PRIM = "csrc/cuda/prim_test.cu"
WINDOW = "csrc/cuda/window_attention.cuh"


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str  # occurs exactly once
    new: str
    by: str = ""  # part of the emulator's message; "" for a wrong result
    program: str = "window"


MUTANTS = [
    Mutant("prim_no_barrier", PRIM, "  sync_threads();  // reverse\n", "", "race|uninitialised", "prim"),
    Mutant("prim_no_syncwarp", PRIM, "  sync_warp();  // reverse_warp\n", "", "race|uninitialised", "prim"),
    Mutant("prim_overrun", PRIM, "s.load(kThreads - 1 - thread_id())", "s.load(kThreads - thread_id())",
           "outside", "prim"),
    Mutant("prim_wait_too_late", PRIM, "  cp_async_wait<1>();  // first", "  cp_async_wait<2>();  // first",
           "before its wait", "prim"),
    Mutant("prim_no_wait", PRIM, "  cp_async_wait<0>();  // second group\n", "", "before its wait", "prim"),
    Mutant("prim_ldmatrix_row", PRIM, "ldmatrix_x4<kTranspose>(r, s, lane_id() * kStride);",
           "ldmatrix_x4<kTranspose>(r, s, (lane_id() ^ 8) * kStride);", "", "prim"),
    Mutant("prim_fragment", PRIM, "mma_m16n8k16<T>(c, af, bf[0], bf[1]);", "mma_m16n8k16<T>(c, af, bf[1], bf[0]);",
           "", "prim"),
    Mutant("prim_misaligned", PRIM, "ldmatrix_x4<true>(bf, sb, (low + half) * 24 + quarter);",
           "ldmatrix_x4<true>(bf, sb, (low + half) * 24 + quarter / 2);", "not aligned", "prim"),
    Mutant("tile_barrier", WINDOW, "    prim::sync_threads();  // P, dS and column_dot of all warps\n", "",
           "race|uninitialised"),
    Mutant("reuse_barrier", WINDOW, "    prim::sync_threads();  // the previous tile's readers\n"
           "    place_tokens(c, tile, at.q_tile, 0, true);\n    prim::sync_threads();\n    if (c.cosine) row_norms(c.q",
           "    place_tokens(c, tile, at.q_tile, 0, true);\n    prim::sync_threads();\n    if (c.cosine) row_norms(c.q",
           "race"),
    Mutant("warp_barrier", WINDOW, "  prim::sync_warp();\n  store_rows(c.g, c.stage", "  store_rows(c.g, c.stage",
           "race|uninitialised"),
    Mutant("no_wait", WINDOW,
           "      prim::cp_async_wait<0>();\n      prim::sync_threads();\n      const int depth = tile",
           "      prim::sync_threads();\n      const int depth = tile", "before its wait"),
    Mutant("unmasked_tail", WINDOW, "return region == kInvalid ? prim::bit_cast<float>(0xff800000u) : x;",
           "return x;"),
    Mutant("uninitialised", WINDOW, "    if (n * 8 < c.g.slot_rows) {\n      const int i",
           "    if (n * 8 < c.g.slot_rows - 8) {\n      const int i", "uninitialised"),
    Mutant("row_overrun", WINDOW, "    const int row = i / chunks, col = (i - row * chunks) * kVec;",
           "    const int row = i / chunks + 1, col = (i - row * chunks + chunks) * kVec;", "outside"),
    Mutant("a_fragment", WINDOW, "(ak0 + k + low + quarter) * a_stride + m0 + half)",
           "(ak0 + k + low + half) * a_stride + m0 + quarter)", ""),
    Mutant("b_fragment", WINDOW, "if (n + 1 < n_tiles) prim::mma_m16n8k16<T>(acc[n + 1], af, bf[2], bf[3]);",
           "if (n + 1 < n_tiles) prim::mma_m16n8k16<T>(acc[n + 1], af, bf[0], bf[3]);", ""),
    Mutant("sign", WINDOW, "p * (dp[n][e] - delta[r])", "p * (dp[n][e] + delta[r])", ""),
    Mutant("table_sign", WINDOW, "(q_meta >> kMetaShift) - (k_meta >> kMetaShift)",
           "c.g.table_size - 1 - (q_meta >> kMetaShift) + (k_meta >> kMetaShift)", ""),
    Mutant("shifted_bound", WINDOW, "if (!w.valid || j >= g.keys)", "if (!w.valid || j >= g.keys - 1)", "unwritten"),
    Mutant("halo_bound", WINDOW, "local_x < g.axis_x.window + g.axis_x.halo;",
           "local_x <= g.axis_x.window + g.axis_x.halo;",
           "outside the array"),
    Mutant("region", WINDOW, "if (region != (q_meta & kRegionBits)) x += ",
           "if (region > (q_meta & kRegionBits)) x += ",
           ""),
    Mutant("no_rescale", WINDOW, "o[n][e] *= rescale[e / 2];", "o[n][e] *= 1.f;", ""),
    Mutant("lost_walk", WINDOW, "ds_sum[n][e] += dp[n][e];\n        }\n      }\n    }\n    dot +=",
           "ds_sum[n][e] = dp[n][e];\n        }\n      }\n    }\n    dot +=", ""),
    Mutant("lost_window", WINDOW, "tile * c.g.slots + row / c.g.slot_rows", "tile * c.g.slots", "written twice"),
    Mutant("pad_gradient", WINDOW, "sums.ds_outside[r] += ds;", "sums.ds_outside[r] += p;", ""),
]  # fmt: skip


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
    mains = {"prim": source / "cuda" / "prim_test.cu", "window": RUNNER.with_name("window_attention_harness.cpp")}
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-fvisibility=hidden", "-DEFFVIT_EMU", "-I", source]
    env = {**os.environ, "CCACHE_BASEDIR": str(folder), "CCACHE_NOHASHDIR": "1"}
    objects = []
    for i, file in enumerate((mains[program], source / "emu" / "emulator.cpp")):
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
    jobs = {"prim": ("prim", None), "window": ("window", None)} | {m.name: (m.program, m) for m in MUTANTS}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = {
            name: pool.submit(compile_and_run, tmp_path_factory.mktemp(name), *job) for name, job in jobs.items()
        }
        return {name: future.result() for name, future in futures.items()}


def error(got, expected):
    return np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)


def test_unmutated_prim(outcomes):
    message, results = outcomes["prim"]
    assert message == ""
    x = np.arange(192.0)
    assert (results["0_reverse"] == x.reshape(3, 64)[:, ::-1].reshape(-1)).all()


def formula(inputs, grad, options, main, small):
    """Outputs and gradients of the reference; main: dtype of the tokens, small: of the table and of logit_scale."""
    dtypes = (main, main, main, small, small, main, main)
    x = [None if x is None else torch.from_numpy(x).to(t) for x, t in zip(inputs, dtypes, strict=True)]
    leaves = [t.requires_grad_() for t in x if t is not None]
    out, lse = window_attention(*x, **options)
    gradients = iter(torch.autograd.grad(out, leaves, torch.from_numpy(grad).to(main)))
    gradients = [None if t is None else next(gradients) for t in x]
    dqkv = torch.cat([t.flatten(-2) for t in gradients[:3]], -1)
    return [None if t is None else t.detach() for t in (out, lse, dqkv, *gradients[3:])]


def test_unmutated_window_attention(outcomes):
    message, results = outcomes["window"]
    assert message == ""
    spec = importlib.util.spec_from_file_location("run_mutant", RUNNER)
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    for case, (sizes, _, _) in enumerate(runner.WINDOW_CASES):
        *inputs, grad = runner.window_inputs(case)
        window, shift, dilation, halo = (sizes[i : i + 2] for i in range(6, 14, 2))
        options = {"window": window, "shift": shift, "dilation": dilation, "halo": halo, "mask_value": -2.0}
        options["scale"] = None if inputs[4] is not None else 0.25

        names = ("out", "lse", "dqkv", "dtable", "dlogit", "dpad_k", "dpad_v")
        truths = formula(inputs, grad, options, torch.float64, torch.float64)
        yardsticks = formula(inputs, grad, options, torch.bfloat16, torch.float32)
        for name, truth, yardstick in zip(names, truths, yardsticks, strict=True):
            if truth is None:
                continue
            first = results[f"0_{case}_{name}"]
            eps = torch.finfo(torch.bfloat16).eps
            assert_close_to_truth(torch.from_numpy(first), truth, yardstick, eps=eps, name=f"{case}_{name}")
            for seed in (1, 2):
                assert (results[f"{seed}_{case}_{name}"] == first).all(), (case, name, seed)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_caught(outcomes, mutant):
    message, results = outcomes[mutant.name]
    if mutant.by:
        assert results is None, "the emulator did not notice"
        assert "emulator: " in message, message
        assert any(part in message for part in mutant.by.split("|")), message
        return
    assert results is not None, message
    correct = outcomes[mutant.program][1]
    wrong = [name for name, x in results.items() if not error(x, correct[name]) < 0.02]
    assert wrong, "every result is right"
