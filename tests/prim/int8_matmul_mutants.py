"""Mutants of the int8_matmul kernels."""

import ctypes
import sys
from pathlib import Path

import numpy as np
from mutants import Mutant, call, check_seeds, pointer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import int_oracle

HARNESS = "tests/prim/int8_matmul_harness.cpp"
KERNEL, MATH = "csrc/cuda/int8_matmul.cuh", "csrc/cuda/int_math.cuh"
INT32, INT8, UINT8, INT16 = (3, np.int32), (4, np.int8), (5, np.uint8), (6, np.int16)
# batches, M, N, K, elements between rows, b transposed, dtypes of a and b, multiplier and shift, dtype
CASES = [
    (2, 70, 70, 16, 0, True, INT8, INT8, (1500000000, 38), INT8),  # eight units of six CTAs, aligned
    (1, 5, 67, 130, 3, False, INT8, INT8, (0, 0), INT32),  # three steps, nothing aligned
    (2, 5, 68, 33, 0, False, UINT8, INT16, (1500000000, 45), INT16),
    (1, 66, 9, 48, 0, True, INT16, UINT8, (1500000000, 46), INT16),
    (1, 3, 4, 20, 4, False, INT16, INT16, (0, 0), INT32),  # saturates
]

MUTANTS = [
    Mutant("unit_barrier", KERNEL, "    prim::sync_threads();  // the previous unit's readers\n", "", "race"),
    Mutant("step_barrier", KERNEL,
           "      prim::sync_threads();  // this step's operands; readers of what is copied over\n", "",
           "race|uninitialised"),
    Mutant("late_wait", KERNEL, "prim::cp_async_wait<0>();  // all", "prim::cp_async_wait<1>();  // all",
           "before its wait"),
    Mutant("early_copy", KERNEL, "load(step + 1);", "load(step + 2);", "race|before its wait|uninitialised"),
    Mutant("row_bound", KERNEL, "if (r < p.M && c < p.N)", "if (r <= p.M && c < p.N)", "outside|written twice"),
    Mutant("row_of_piece", KERNEL, "row + r < from.rows ?", "row + r <= from.rows ?", "outside"),
    Mutant("depth_of_column", KERNEL, "const bool there = first + j < rows;", "const bool there = first + j <= rows;",
           "outside"),
    Mutant("width", KERNEL, "there && c + e < width ?", "there && c < width ?", "outside"),
    Mutant("alignment", KERNEL, "row * size % bytes == 0;", "true;", "not aligned"),
    Mutant("sign_of_digit", KERNEL, "i == kDigits - 1 ? y : y & 127", "i == 2 ? y : y & 127"),
    Mutant("weight", KERNEL, "static_cast<Total>(sum[1][e]) * (1 << (7 * weight))",
           "static_cast<Total>(sum[1][e]) * (1 << (6 * weight))"),
    Mutant("lost_pair", KERNEL, "if (j < 0 || j >= kB) continue;", "if (j <= 0 || j >= kB) continue;"),
    Mutant("b_fragment", KERNEL, "(at.low + at.quarter) * kStride + 2 * at.half",
           "(at.low + at.half) * kStride + 2 * at.quarter"),
    Mutant("transposed_block", KERNEL, "y.v[j] = digit_of(x[j].v[e], digit);", "y.v[j] = digit_of(x[e].v[j], digit);"),
    Mutant("wraps", MATH, "clamped(sum, INT32_MIN, INT32_MAX)", "static_cast<int32_t>(sum)"),
    Mutant("batch_of_result", KERNEL, "(batch * p.M + r) * p.N + c", "r * p.N + c", "outside|written twice|hole"),
]  # fmt: skip


def padded(x, columns):
    """x with more columns at the end, of noise."""
    wide = np.full((*x.shape[:-1], x.shape[-1] + columns), 77, x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide


def inputs_of(case):
    B, M, N, K, _, transposed, (_, a), (_, b), *_ = CASES[case]
    random = np.random.default_rng(case)
    shapes = ((B, M, K), (B, N, K) if transposed else (B, K, N))
    return tuple(
        random.integers(np.iinfo(t).min, np.iinfo(t).max + 1, s).astype(t) for s, t in zip(shapes, (a, b), strict=True)
    )


def run(library):
    for case, (B, M, N, K, gap, transposed, a_dtype, b_dtype, rescale, (number, dtype)) in enumerate(CASES):
        out = np.zeros((B, M, N), dtype)
        tensors = [*(padded(x, gap) for x in inputs_of(case)), out]
        addresses = (ctypes.c_void_p * len(tensors))(*[pointer(t).value for t in tensors])
        ends = np.iinfo(dtype).min, np.iinfo(dtype).max
        sizes = [B, M, N, K, gap, transposed, a_dtype[0], b_dtype[0], number, *rescale, *ends]
        call(library.run_int8_matmul, (ctypes.c_int64 * len(sizes))(*sizes), addresses)
        yield f"{case}", out.astype(np.float64)


def check(results):
    check_seeds(results)
    for case, (*_, transposed, _, _, rescale, (_, dtype)) in enumerate(CASES):
        expected = int_oracle.int8_matmul(*inputs_of(case), transposed, *rescale, 32, dtype)
        assert np.abs(expected.astype(np.int64)).max() > 50
        np.testing.assert_array_equal(results[f"0_{case}"], expected.astype(np.float64))
