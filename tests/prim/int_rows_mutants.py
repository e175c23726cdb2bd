"""Mutants of the integer row-wise kernels and of the functors of their ops."""

import ctypes
import sys
from pathlib import Path

import numpy as np
from mutants import Mutant, call, check_seeds, pointer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import int_oracle

HARNESS = "tests/prim/int_rows_harness.cpp"
KERNEL, PARAMS, MATH = "csrc/cuda/int_rows.cuh", "csrc/rows/int_params.h", "csrc/rows/int_math.h"
SHIFTMAX, GELU, NORM = "csrc/rows/shiftmax.h", "csrc/rows/shift_gelu.h", "csrc/rows/int_norm.h"
REQUANTIZE = "csrc/rows/requantize.h"
DTYPES = {np.dtype(np.int32): 3, np.dtype(np.int8): 4, np.dtype(np.uint8): 5, np.dtype(np.int16): 6}
INT32, INT8, INT16 = (3, np.int32), (4, np.int8), (6, np.int16)
# op, outer, inner, columns, strides of the two dims of x, size of x, options of the oracle, dtype
CASES = [
    (0, 2, 5, 40, 300, 41, 60, {"x0": -20, "n": 15, "bits": 8, "half_bit": True}, INT8),
    (0, 3, 1, 70, 90, 90, 9000, {"x0": -60001, "n": 15, "bits": 16, "half_bit": False}, INT16),
    (0, 1, 30, 7, 400, 9, 60, {"x0": -65535, "n": 15, "bits": 16, "half_bit": True}, INT16),  # sums are cut off
    (0, 2, 2, 20, 80, 33, 5, {"x0": -5, "n": 4, "bits": 16, "half_bit": False}, INT16),  # few bits
    (1, 2, 4, 40, 300, 41, 40, {"x0": -12, "n": 23, "bits": 8, "half_bit": True, "safe_max": True, "multiplier": 2**30,
                                "shift": 36}, INT8),
    (1, 2, 2, 33, 80, 33, -40, {"x0": -12, "n": 23, "bits": 8, "half_bit": True, "safe_max": False, "multiplier": 0,
                                "shift": 1}, INT32),  # below 0
    (1, 2, 2, 33, 80, 33, -40, {"x0": -12, "n": 23, "bits": 8, "half_bit": True, "safe_max": True, "multiplier": 0,
                                "shift": 1}, INT32),
    (1, 1, 2, 33, 80, 33, 1e8, {"x0": -12, "n": 23, "bits": 8, "half_bit": True, "safe_max": True, "multiplier": 0,
                                "shift": 1}, INT32),  # saturates
    (2, 2, 4, 40, 300, 41, 3000, {"exact": False, "truncate": False}, INT8),
    (2, 2, 4, 33, 300, 41, 2, {"exact": True, "truncate": False}, INT32),
    (2, 2, 4, 33, 300, 41, 5, {"exact": False, "truncate": True}, INT32),
    (2, 1, 2, 33, 300, 41, 1e8, {"exact": True, "truncate": False}, INT32),  # far from the mean
    (3, 2, 4, 40, 300, 41, 3000, {"bits": 8}, INT8),
    (3, 2, 4, 33, 300, 41, 5, {"bits": 16}, INT16),
    (0, 2, 5, 40, 300, 41, 60, {"x0": -20, "n": 15, "bits": 8, "half_bit": True}, INT8, np.int8),
    (1, 2, 4, 40, 300, 41, 90, {"x0": -12, "n": 23, "bits": 8, "half_bit": True, "safe_max": True, "multiplier": 2**30,
                                "shift": 36}, INT8, np.uint8),
    (2, 2, 4, 40, 300, 41, 3000, {"exact": False, "truncate": False}, INT8, np.int16),
    (3, 2, 4, 40, 300, 41, 100, {"bits": 16}, INT16, np.int8),
    (4, 2, 4, 40, 300, 41, 100, {"exact": False, "truncate": False, "bits": 12}, INT8, np.int8),
]  # fmt: skip
MUTANTS = [
    Mutant("lost_columns", KERNEL, "i < p.columns; i += prim::kWarpSize) {\n    const int32_t value",
           "i + 1 < p.columns; i += prim::kWarpSize) {\n    const int32_t value", "written"),
    Mutant("too_many_columns", KERNEL, "i < p.columns; i += prim::kWarpSize) {\n      const int32_t y",
           "i < p.columns + 1; i += prim::kWarpSize) {\n      const int32_t y", "outside"),
    Mutant("lost_sums", KERNEL, "i < p.columns; i += prim::kWarpSize) {\n      const int32_t m",
           "i + 1 < p.columns; i += prim::kWarpSize) {\n      const int32_t m", "written"),
    Mutant("signs_of_bytes", KERNEL, "type == DType::kInt8 ? 128 : 0", "type == DType::kUInt8 ? 128 : 0", ""),
    Mutant("ends_of_sums", KERNEL, "m2, c2, p.sum_low, p.sum_high)", "m2, c2, p.low, p.high)", ""),
    Mutant("offset", NORM, "y = saturating_sum(y, vectors[1]);", "y = saturating_sum(y, vectors[0]);", ""),
    Mutant("lost_row", KERNEL, "r < p.rows; r += step", "r + 1 < p.rows; r += step", "written"),
    Mutant("even_lanes", KERNEL, "for (int m = prim::kWarpSize / 2; m > 0; m /= 2) {\n      if constexpr",
           "for (int m = prim::kWarpSize / 2; m > 1; m /= 2) {\n      if constexpr", ""),
    Mutant("low_half_of_sums", KERNEL, "low | high << 32", "low", ""),
    Mutant("sum_not_cut_off", KERNEL, "total > 0x7fffffff ? 0x7fffffff : total;",
           "total > 0x7fffffff ? 0x3fffffff : total;", ""),
    Mutant("row_of_outer", PARAMS, "(row - outer * p.size[k])", "(row - outer)", "outside"),
    Mutant("half_bit", MATH, "& e.mask) << (e.n - q)", ") << (e.n - q)", ""),
    Mutant("remainder", MATH, "+ q * e.x;", "- q * e.x;", ""),
    Mutant("power", MATH, "- (U)(d >> 4)", "- (U)(d >> 3)", ""),
    Mutant("ties", MATH, "- 1 + (u >> c & 1)", "", ""),
    Mutant("offset_of_rounding", MATH, "static_cast<int64_t>(offset >> c)",
           "static_cast<int64_t>(offset >> c) - 1", ""),
    Mutant("reciprocal", SHIFTMAX, "0x7fffffff / static_cast", "0x3fffffff / static_cast", ""),
    Mutant("unsafe_maximum", GELU, "p.flags[0] && total < 0 ? 0 : total", "total", ""),
    Mutant("sigmoid_of_top", GELU, "least(e + row.of_top,", "least(e + e,", ""),
    Mutant("above_0", GELU, "(q * x - p)", "(p - q * x)", ""),
    Mutant("floor_of_mean", NORM, "(up ? 1 : 0)", "0", ""),
    Mutant("steps_of_newton", NORM, "i < 10", "i < 6", ""),
    Mutant("towards_0", NORM, "if (p.flags[1]) y =", "if (false) y =", ""),
    Mutant("furthest", NORM, "kFurthest = 46340", "kFurthest = 46000", ""),
    Mutant("residual_lost", REQUANTIZE, "residual, v[2], shift_of(v[3])", "residual, v[2], shift_of(v[1])", ""),
]  # fmt: skip


def magic_of(x, n):
    """(variant, multiplier, shift) of a division of at most n x by x: see csrc/rows/int_rows.h."""
    for k in range(31, 0, -1):
        magic = -(-(2**k) // x)
        if magic * n * x < 2**32 and (magic * x - 2**k) * n * x < 2**k:
            return 0, magic, k
    return 1, -(-(2 ** (30 + x.bit_length())) // x), x.bit_length() - 2


def inputs_of(case):
    """x with its rows apart, residual, vectors."""
    op, outer, inner, columns, outer_stride, inner_stride, size, options, (_, dtype), *kind = CASES[case]
    random = np.random.default_rng(case)
    room = (outer - 1) * outer_stride + (inner - 1) * inner_stride + columns
    x = np.rint(np.clip(random.standard_normal(room) * abs(size), -(2.0**31), 2.0**31 - 1)).astype(np.int32)
    if size < 0:
        x = -1 - np.abs(x)
    if kind:
        info = np.iinfo(kind[0])
        x = np.clip(x, info.min, info.max).astype(kind[0])
    residual, vectors = None, [None] * 8
    multiplier = [random.integers(2**30, 2**31, columns, dtype=np.int64).astype(np.int32) for _ in range(2)]
    if op == 2:
        vectors[0] = random.integers(-(2**29), 2**29, columns).astype(np.int32)
        if dtype == np.int8:  # an offset, too
            vectors[1:4] = (
                random.integers(-9, 9, columns).astype(np.int32),
                multiplier[0],
                np.full(columns, 53, np.int32),
            )
    if op == 3:
        vectors[:2] = multiplier[0], np.full(columns, 37 if dtype == np.int8 else 32, np.int32)
        if dtype == np.int16:
            vectors[0] = np.full(columns, 2**30, np.int32)
            residual = random.integers(-500, 500, (outer, inner, columns)).astype(np.int32)
            vectors[2:4] = multiplier[1], np.full(columns, 34, np.int32)
    if op == 4:
        residual = random.integers(-900, 900, (outer, inner, columns)).astype(np.int16)
        vectors[0] = random.integers(-(2**29), 2**29, columns).astype(np.int32)
        vectors[2:4] = multiplier[0], np.full(columns, 53, np.int32)
        vectors[4:] = (v for k in (27, 31) for v in (multiplier[1], np.full(columns, k, np.int32)))
    return x, residual, vectors


def rows_of(case, x):
    _, outer, inner, columns, outer_stride, inner_stride, *_ = CASES[case]
    strides = (outer_stride * x.itemsize, inner_stride * x.itemsize, x.itemsize)
    return np.lib.stride_tricks.as_strided(x, (outer, inner, columns), strides)


def run(library):
    for case, (op, outer, inner, columns, *more) in enumerate(CASES):
        outer_stride, inner_stride, _, options, (number, dtype) = more[:5]
        x, residual, vectors = inputs_of(case)
        out, total = (np.zeros((outer, inner, columns), t) for t in (dtype, np.int16))
        variant, magic, shift = magic_of(-options["x0"], options["n"]) if op < 2 else (0, 0, 0)
        if op >= 2:
            variant = (residual if op == 3 else vectors[2]) is not None
        info = np.iinfo(dtype)
        flags = (options.get("safe_max", options.get("exact", False)), options.get("truncate", False))
        numbers = [
            op,
            outer,
            inner,
            columns,
            outer_stride,
            inner_stride,
            variant,
            -options.get("x0", -1),
            options.get("n", 4),
            magic,
        ]
        numbers += [shift, 2**32 - 1 if options.get("half_bit", True) else 2**32 - 2, options.get("bits", 8)]
        numbers += [info.min, info.max, options.get("multiplier", 0), options.get("shift", 1), *flags, number]
        most = 2 ** (options.get("bits", 16) - 1)
        numbers += [DTYPES[x.dtype], 3 if residual is None else DTYPES[residual.dtype], -most, most - 1]
        tensors = (x, residual, *vectors, out, total if op == 4 else None)
        addresses = (ctypes.c_void_p * len(tensors))(*[pointer(t).value for t in tensors])
        call(library.run_int_rows, (ctypes.c_int64 * len(numbers))(*map(int, numbers)), addresses)
        # An element off by one counts, however large others are.
        expected = oracle(case)
        if op == 4:
            expected, right = expected
            yield f"{case}_sum", np.where(total == right, 1.0, 0.0)
        yield f"{case}_out", np.where(out == expected, 1.0, 0.0)


def oracle(case):
    op, *_ = CASES[case]
    options, (_, dtype) = CASES[case][7:9]
    x, residual, vectors = inputs_of(case)
    x = rows_of(case, x)
    if op < 2:
        return (int_oracle.shiftmax if op == 0 else int_oracle.shift_gelu)(x, **options, dtype=dtype)
    if op == 2:
        bias, offset, multiplier, shift = vectors[:4]
        return int_oracle.int_layer_norm(x, bias, multiplier, shift, offset, **options, dtype=dtype)
    if op == 4:
        bias, offset, multiplier, shift, *scales = vectors
        return int_oracle.int_add_layer_norm(
            x, residual, *scales, bias, multiplier, shift, offset, **options, dtype=dtype
        )
    return int_oracle.requantize(x, *vectors[:2], residual, *vectors[2:4], **options, dtype=dtype)


def check(results):
    check_seeds(results)
    for name, right in results.items():
        assert right.all(), name
