"""Mutants of the primitives' test kernels."""

import ctypes

import numpy as np
from mutants import Mutant, bf16, call, check_seeds, nbytes, pointer

HARNESS = "csrc/cuda/prim_test.cu"
PRIM = HARNESS
CASES = {  # name: (input, shape and dtype of the output)
    "reverse": (np.arange(192, dtype=np.float32), (192,), np.float32),
    "reverse_warp": (np.arange(192, dtype=np.float32), (192,), np.float32),
    "any": (np.eye(3, 64, 5, dtype=np.int32), (192,), np.int32),
    "shuffle": (np.arange(64, dtype=np.float32) ** 2, (6, 64), np.float32),
    "ldmatrix": (np.arange(256, dtype=np.uint16), (128,), np.uint32),
    "ldmatrix_trans": (np.arange(256, dtype=np.uint16), (128,), np.uint32),
    "mma_ldmatrix_bf16": (None, (16, 8), np.float32),
    "cp_async": (np.arange(2048, dtype=np.uint32).astype(np.uint8) | 1, (2048,), np.uint8),
}

MUTANTS = [
    Mutant("no_barrier", PRIM, "  sync_threads();  // reverse\n", "", "race|uninitialised"),
    Mutant("no_syncwarp", PRIM, "  sync_warp();  // reverse_warp\n", "", "race|uninitialised"),
    Mutant("overrun", PRIM, "s.load(kThreads - 1 - thread_id())", "s.load(kThreads - thread_id())",
           "outside"),
    Mutant("wait_too_late", PRIM, "  cp_async_wait<1>();  // first", "  cp_async_wait<2>();  // first",
           "before its wait"),
    Mutant("no_wait", PRIM, "  cp_async_wait<0>();  // second group\n", "", "before its wait"),
    Mutant("ldmatrix_row", PRIM, "ldmatrix_x4<kTranspose>(r, s, lane_id() * kStride);",
           "ldmatrix_x4<kTranspose>(r, s, (lane_id() ^ 8) * kStride);", ""),
    Mutant("fragment", PRIM, "mma_m16n8k16<T>(c, af, bf[0], bf[1]);", "mma_m16n8k16<T>(c, af, bf[1], bf[0]);",
           ""),
    Mutant("misaligned", PRIM, "ldmatrix_x4<true>(bf, sb, (low + half) * 24 + quarter);",
           "ldmatrix_x4<true>(bf, sb, (low + half) * 24 + quarter / 2);", "not aligned"),
]  # fmt: skip


def run(library):
    for name, (x, shape, dtype) in CASES.items():
        y = None
        if x is None:
            x = bf16(np.arange(256) % 13 - 6.0)
            y = bf16(np.arange(128) % 7 - 3.0)
        out = np.zeros(shape, dtype)
        call(
            library.effvit_prim_test, name.encode(), pointer(x), nbytes(x), pointer(y), nbytes(y),
            pointer(out), nbytes(out), ctypes.c_int(0),
        )  # fmt: skip
        yield name, out.astype(np.float64)


def check(results):
    x = np.arange(192.0)
    assert (results["0_reverse"] == x.reshape(3, 64)[:, ::-1].reshape(-1)).all()
    check_seeds(results)
