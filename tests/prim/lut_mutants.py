"""Mutants of the kernel of quantize_lut, dequantize_lut and fake_quantize_lut."""

import ctypes

import numpy as np
from mutants import Mutant, call, check_seeds, pointer

OPS = ("quantize_lut", "dequantize_lut", "fake_quantize_lut")
HARNESS = "tests/prim/lut_harness.cpp"
KERNEL = "csrc/cuda/lut.cuh"
# op, rows, columns, elements between rows, codes, descending
CASES = [
    (0, 5, 8, 4, 16, False),  # whole vectors
    (0, 3, 7, 2, 9, True),  # not a power of two, tails
    (0, 5000, 10, 0, 4, False),  # more than the threads take at once
    (1, 5, 7, 1, 16, False),
    (1, 4, 8, 5, 100, False),  # rows not aligned; codes beyond the table are NaN
    (2, 5, 7, 1, 9, False),
    (2, 4, 12, 0, 256, False),
]

MUTANTS = [
    Mutant("barrier", KERNEL, "  prim::sync_threads();\n", "", "race|uninitialised"),
    Mutant("equal_thresholds", KERNEL, "x >= thresholds.load", "x > thresholds.load"),
    Mutant("off_by_one", KERNEL, "thresholds.load(probe - 1)", "thresholds.load(probe)", "uninitialised|outside"),
    Mutant("last_threshold", KERNEL, "if (probe <= n &&", "if (probe < n &&"),
    Mutant("bound", KERNEL, "if (probe <= n &&", "if (", "uninitialised|outside"),
    Mutant("lost_bit", KERNEL, "while ((p.codes - 1) >> bits) ++bits;", "while (p.codes >> (bits + 1)) ++bits;"),
    Mutant("table", KERNEL, "if (i < p.codes - 1) thresholds.store", "thresholds.store", "outside"),
    Mutant("tail_of_load", KERNEL, "e < n ? prim::load_global(from + e) : In{}", "prim::load_global(from + e)",
           "outside"),
    Mutant("tail_of_store", KERNEL, "if (e < n) prim::store_global", "prim::store_global", "outside|written twice"),
    Mutant("gap", KERNEL, "row_start(p, row) + column", "row * p.columns + column"),
    Mutant("next_group", KERNEL, "groups; i += step", "groups; i += groups", "unwritten"),
    Mutant("ascending", KERNEL, "p.descending ? p.codes - 1 - code : code", "p.descending ? p.codes - code : code"),
    Mutant("beyond", KERNEL, "code < p.codes ? values.load(code) : prim::bit_cast<float>(0x7fc00000u)",
           "values.load(code)", "uninitialised"),
    Mutant("nan", KERNEL, "v = given == given ? v : given;", "v = v;"),
    Mutant("alignment", KERNEL, "vec = vec && p.x_stride[k] % kGroup == 0;", "vec = vec && true;", "aligned"),
]  # fmt: skip


def tables_of(case):
    """thresholds [codes - 1], values [codes] or None, as the op takes them."""
    op, *_, codes, _ = CASES[case]
    random = np.random.default_rng(case)
    thresholds = np.sort(random.standard_normal(codes - 1)).astype(np.float32)
    values = (random.standard_normal(codes) * 3).astype(np.float32)
    return None if op == 1 else thresholds, None if op == 0 else values


def input_of(case):
    op, rows, columns, *_, codes, _ = CASES[case]
    random = np.random.default_rng(100 + case)
    if op == 1:
        return random.integers(0, min(256, codes + 8), (rows, columns)).astype(np.uint8)
    thresholds, _ = tables_of(case)
    x = random.standard_normal((rows, columns)).astype(np.float32)
    x[0, :3] = thresholds[0], thresholds[-1], np.nan
    return x


def run(library):
    for case, (op, rows, columns, gap, codes, descending) in enumerate(CASES):
        x = input_of(case)
        wide = np.full((rows, columns + gap), 1, x.dtype)
        wide[:, :columns] = x
        out = np.zeros((rows, columns), np.uint8 if op == 0 else np.float32)
        tensors = [wide, *tables_of(case), out]
        addresses = (ctypes.c_void_p * 4)(*[pointer(t).value for t in tensors])
        call(library.run_lut, (ctypes.c_int64 * 6)(op, rows, columns, gap, codes, descending), addresses)
        # A NaN is a result of its own: no number here is.
        yield f"{case}", np.nan_to_num(out.astype(np.float64), nan=1000.0)


def check(results):
    check_seeds(results)
    for case, (op, *_, codes, descending) in enumerate(CASES):
        x, (thresholds, values) = input_of(case), tables_of(case)
        if op == 1:
            expected = np.append(values, np.full(256 - codes, np.nan, np.float32))[x]
        else:
            code = (x[..., None] >= thresholds).sum(-1)
            expected = codes - 1 - code if descending else code
            if op == 2:
                expected = np.where(np.isnan(x), x, values[code])
        np.testing.assert_array_equal(results[f"0_{case}"], np.nan_to_num(expected.astype(np.float64), nan=1000.0))
