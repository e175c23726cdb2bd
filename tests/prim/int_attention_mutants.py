"""Mutants of the int_attention kernels."""

import ctypes
import sys
from pathlib import Path

import numpy as np
from mutants import Mutant, call, check_seeds, pointer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import int_oracle

HARNESS = "tests/prim/int_attention_harness.cpp"
KERNEL = "csrc/cuda/int_attention.cuh"
INT32, INT8, UINT8, INT16 = (3, np.int32), (4, np.int8), (5, np.uint8), (6, np.int16)
# B, L, M, H, K, V, W, elements between rows, options of the oracle
CASES = [
    (2, 70, 70, 2, 16, 8, 2, 0, {"x0": -20, "n": 15, "bits": 8}, INT8),  # eight units of six CTAs, aligned
    (2, 5, 130, 1, 70, 67, 1, 3, {"x0": -300, "n": 15, "bits": 16}, INT16),  # two chunks of depth and of values
    (1, 3, 9, 1, 33, 12, 0, 1, {"x0": -60001, "n": 15, "bits": 11}, INT32),  # sums are cut off
    (1, 1, 600, 1, 3, 4, 0, 0, {"x0": -65535, "n": 15, "bits": 16}, INT32),  # and 64 bits are needed
]
SCORES, RESULT = (1400000000, 41), (1500000000, 36)

MUTANTS = [
    Mutant("step_barrier", KERNEL,
           "          prim::sync_threads();  // this step's operands; readers of what is copied over\n",
           "", "race|uninitialised"),
    Mutant("values_barrier", KERNEL, "          prim::sync_threads();  // the values\n", "", "race|uninitialised"),
    Mutant("early_copy", KERNEL, "load(step + 1);", "load(step + 2);", "race|before its wait|uninitialised"),
    Mutant("key_bound", KERNEL, "const bool there = column < p.M;", "const bool there = column <= p.M;", "outside"),
    Mutant("values_bound", KERNEL, "if (key >= keys) continue;", "if (key > keys) continue;", "outside"),
    Mutant("row_bound", KERNEL, "if (r < p.L && c < p.V)", "if (r <= p.L && c < p.V)", "outside|written twice"),
    Mutant("channel_bound", KERNEL, "if (channel + c < channels)", "if (channel < channels)", "outside"),
    Mutant("alignment", KERNEL, "(p.v_stride_b | p.v_stride_l | p.v_stride_h | p.V) % 4 == 0", "true", "not aligned"),
    Mutant("key_order", KERNEL, "const int key = first + j / 2 * 8 + j % 2;", "const int key = first + j;"),
    Mutant("digits", KERNEL, "(x >> (7 * digit) & 127u)", "(x >> (8 * digit) & 127u)"),
    Mutant("weight_of_digits", KERNEL, "sum[0][e] *= 128, sum[1][e] *= 128;", "sum[0][e] *= 64, sum[1][e] *= 64;"),
    Mutant("query_fragment", KERNEL, "(warp_row() + at.low + at.half) * kStride + 2 * at.quarter",
           "(warp_row() + at.low + at.quarter) * kStride + 2 * at.half"),
    Mutant("probability_fragment", KERNEL, "[i % 2 * 2 + j % 2]", "[j % 2 * 2 + i % 2]"),
    Mutant("bias_of_sample", KERNEL, "b % p.W * p.bias_stride_w", "b / p.W * p.bias_stride_w", "outside"),
    Mutant("bias_of_row", KERNEL, "bias + r * p.bias_stride_l + column", "bias + acc_row() * p.bias_stride_l + column"),
    Mutant("row_of_lane", KERNEL, "for (int m = 2; m > 0; m /= 2) x = most<int32_t>",
           "for (int m = 1; m > 0; m /= 2) x = most<int32_t>"),
    Mutant("head_of_result", KERNEL, "((b * p.L + r) * p.H + h) * p.V + c", "((b * p.H + h) * p.L + r) * p.V + c"),
    Mutant("bits_of_probability", KERNEL, ">> (32 - p.bits)", ">> (31 - p.bits)"),
]  # fmt: skip


def padded(x, columns):
    """x with more columns at the end, of noise."""
    wide = np.full((*x.shape[:-1], x.shape[-1] + columns), 77, x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide


def inputs_of(case):
    B, L, M, H, K, V, W, *_ = CASES[case]
    random = np.random.default_rng(case)
    q, k, v = (random.integers(-128, 128, s).astype(np.int8) for s in ((B, L, H, K), (B, M, H, K), (B, M, H, V)))
    bias = random.integers(-60, 60, (W, H, L, M)).astype(np.int32) if W else None
    return q, k, v, bias


def shift_exp_numbers(x0, n):
    """n, x, magic, its shift, wide: see csrc/rows/int_rows.h."""
    x = -x0
    for k in range(31, 0, -1):
        magic = -(-(2**k) // x)
        if magic * n * x < 2**32 and (magic * x - 2**k) * n * x < 2**k:
            return [n, x, magic, k, 0]
    bits = x.bit_length()
    return [n, x, -(-(2 ** (30 + bits)) // x), bits - 2, 1]


def ends(dtype):
    info = np.iinfo(dtype)
    return [info.min, info.max]


def run(library):
    for case, (B, L, M, H, K, V, W, gap, options, (number, dtype)) in enumerate(CASES):
        q, k, v, bias = inputs_of(case)
        out = np.zeros((B, L, H, V), dtype)
        tensors = [padded(q, gap), padded(k, gap), padded(v, gap), bias, out]
        addresses = (ctypes.c_void_p * len(tensors))(*[pointer(t).value for t in tensors])
        sizes = [B, L, M, H, K, V, max(W, 1), gap, *shift_exp_numbers(options["x0"], options["n"]), options["bits"]]
        sizes += [*SCORES, -128, 127, *(RESULT if dtype != np.int32 else (0, 0)), *ends(dtype), number]
        call(library.run_int_attention, (ctypes.c_int64 * len(sizes))(*sizes), addresses)
        yield f"{case}", out.astype(np.float64)


def check(results):
    check_seeds(results)
    for case, (*_, options, (_, dtype)) in enumerate(CASES):
        multiplier, shift = RESULT if dtype != np.int32 else (0, 0)
        expected = int_oracle.int_attention(
            *inputs_of(case), *SCORES, **options, half_bit=True, score_bits=8, multiplier=multiplier, shift=shift,
            out_bits=32, dtype=dtype,
        )  # fmt: skip
        assert np.abs(expected.astype(np.int64)).max() > 50
        np.testing.assert_array_equal(results[f"0_{case}"], expected.astype(np.float64))
