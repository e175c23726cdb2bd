"""Mutants of the sparse24_int8_linear kernels."""

import ctypes

import numpy as np
from mutants import Mutant, bf16, call, check_seeds, from_bf16, pointer

HARNESS = "tests/prim/sparse24_int8_linear_harness.cpp"
KERNEL, TILES = "csrc/cuda/sparse24_int8_linear.cuh", "csrc/cuda/int8_tiles.cuh"
FLOAT32, BFLOAT16, FLOAT16, INT32, INT8 = range(5)
NONE, RELU = 0, 1
KEPT = np.array([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], np.uint8)
OUT_SCALE = 0.25
# M, N, K, padding of rows, number of row scales, out dtype, with bias and residual, activation
CASES = [
    (70, 136, 256, 0, 70, BFLOAT16, True, NONE),  # large tiles, two of channels; everything is aligned
    (130, 72, 292, 3, 1, INT8, True, RELU),  # two tiles of tokens; nothing is; the last step is short
    (20, 40, 520, 0, 20, FLOAT32, False, NONE),  # medium tiles, more steps than stages, a byte of metadata is left
    (5, 442, 132, 4, 5, INT32, False, NONE),  # small tiles, two for a CTA: the raw sums
]

MUTANTS = [
    Mutant("step_barrier", KERNEL,
           "      prim::sync_threads();  // this step's operands, and the readers of the step before, over which the "
           "next is copied\n", "", "race|uninitialised|before its wait"),
    Mutant("stage_barrier", KERNEL,
           "    prim::sync_threads();  // the readers of the operands, over which the sums are staged\n", "", "race"),
    Mutant("sums_barrier", KERNEL, "    stage_sums<S>(sums, acc);\n    prim::sync_threads();\n",
           "    stage_sums<S>(sums, acc);\n", "race|uninitialised"),
    Mutant("tile_barrier", KERNEL, "    prim::sync_threads();  // the previous tile's readers\n", "", "race"),
    Mutant("wait_too_late", KERNEL, "cp_async_wait<S::kStages - 2>", "cp_async_wait<S::kStages - 1>",
           "before its wait"),
    Mutant("no_empty_group", KERNEL, "      prim::cp_async_commit();  // an empty", "      if (step < steps) "
           "prim::cp_async_commit();  // an empty", "before its wait"),
    Mutant("zero_metadata", KERNEL, "kUnused = 0xee;", "kUnused = 0;", "metadata nibble"),
    Mutant("zero_rows_of_metadata", TILES, "if (vec && (kFill == 0 || n != 0)) {", "if (vec) {", "metadata nibble"),
    Mutant("row_bound", TILES, "row + r < from.rows ?", "row + r <= from.rows ?", "outside"),
    Mutant("depth_bound", TILES, "? from.cols - col - c : 0", "? from.cols - col : 0", "outside"),
    Mutant("metadata_lanes", KERNEL, "lane % 2 * 8) * S::kMetaBytes + lane % 4 / 2 * 4",
           "lane % 4 / 2 * 8) * S::kMetaBytes + lane % 2 * 4"),
    Mutant("metadata_step", KERNEL, "c * 16 * S::kMetaBytes + k / 8)", "c * 16 * S::kMetaBytes + k / 16)"),
    Mutant("values_step", KERNEL, "S::kValuesStride + k / 2)", "S::kValuesStride)"),
    Mutant("values_fragment", KERNEL, "(channel + at.low + at.half) * S::kValuesStride + 2 * at.quarter",
           "(channel + at.low + at.quarter) * S::kValuesStride + 2 * at.half"),
    Mutant("metadata_depth", KERNEL, "channel, k / 8);", "channel, k / 16);", "not aligned"),
    Mutant("tokens_fragment", KERNEL, "lane % 8) * S::kXStride + lane / 8 * 16",
           "lane % 8) * S::kXStride + lane / 8 * 8", "not aligned"),
    Mutant("warps", KERNEL, "prim::warp_id() % S::kWarpsT * (S::kTilesT * 8)", "prim::warp_id() % S::kWarpsC * "
           "(S::kTilesT * 8)", "race|uninitialised"),
    Mutant("not_transposed", KERNEL, "channel + c * 16 + e / 2 * 8, acc[c][t][e]",
           "channel + c * 16 + e / 2 * 8, acc[c][t][e ^ 3]"),
    Mutant("channel_bound", KERNEL, "static_cast<int>(least(S::kChannels, g.p.N - channel))", "S::kChannels",
           "outside|written twice"),
    Mutant("token_bound", KERNEL, "static_cast<int>(least(S::kTokens, g.p.M - token))", "S::kTokens",
           "outside|written twice"),
    Mutant("lost_step", KERNEL, "static_cast<int>(ceil_div(g.p.K, S::kDepth))", "static_cast<int>(g.p.K / S::kDepth)"),
    Mutant("alignment", TILES, "aligned16(base, 1, {stride})}", "aligned16(base, 1, {})}", "not aligned"),
]  # fmt: skip


def inputs_of(case):
    """Arrays by name: nibbles are unpacked, rows have no padding."""
    m, n, k, _, scales, _, extras, _ = CASES[case]
    random = np.random.default_rng(case)
    x, values = (random.integers(-128, 128, s).astype(np.int8) for s in ((m, k), (n, k // 2)))
    x[0], values[0] = -128, -128
    nibbles = random.choice(KEPT, (n, k // 4))
    nibbles[:6] = KEPT[:n, None]
    x_scale, w_scale = ((random.random(s) + 0.5).astype(np.float32) / 100 for s in (scales, n))
    bias, residual = (from_bf16(bf16(random.standard_normal(s))) if extras else None for s in ((n,), (m, n)))
    return x, values, nibbles, x_scale, w_scale, bias, residual


def dense(values, nibbles):
    w = np.zeros((*nibbles.shape, 4), np.int64)
    pairs = values.reshape(*nibbles.shape, 2)
    for i, position in enumerate((nibbles & 3, nibbles >> 2)):
        np.put_along_axis(w, position[..., None].astype(np.int64), pairs[..., i : i + 1], -1)
    return w.reshape(len(values), -1)


def padded(x, columns):
    """The same rows in wider ones: (whole array, number of columns)."""
    return np.ascontiguousarray(np.pad(x, ((0, 0), (0, columns)))) if columns else x


def run(library):
    for case, (m, n, k, padding, scales, out_dtype, extras, activation) in enumerate(CASES):
        x, values, nibbles, x_scale, w_scale, bias, residual = inputs_of(case)
        nibbles = np.pad(nibbles, ((0, 0), (0, nibbles.shape[1] % 2)), constant_values=0b1110)
        meta = np.ascontiguousarray(nibbles[:, ::2] | nibbles[:, 1::2] << 4)
        x, values = padded(x, padding), padded(values, padding)
        residual = bf16(padded(residual, padding)) if extras else None
        out = np.zeros((m, n), {FLOAT32: np.float32, BFLOAT16: np.uint16, INT32: np.int32, INT8: np.int8}[out_dtype])
        tensors = [x, values, meta, x_scale, w_scale, bias, residual, out]
        sizes = (m, n, k, k + padding, k // 2 + padding, n + padding, scales, out_dtype, FLOAT32, BFLOAT16, activation)
        call(
            library.run_sparse24_int8_linear, (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_void_p * len(tensors))(*[pointer(t).value for t in tensors]), ctypes.c_float(OUT_SCALE),
        )  # fmt: skip
        yield f"{case}_out", (from_bf16(out) if out_dtype == BFLOAT16 else out).astype(np.float64)


def check(results):
    """Against int64 sums and a float64 epilogue: raw sums are exact, the rest is to the output's rounding."""
    check_seeds(results)
    for case, (*_, out_dtype, extras, activation) in enumerate(CASES):
        x, values, nibbles, x_scale, w_scale, bias, residual = inputs_of(case)
        acc, out = x.astype(np.int64) @ dense(values, nibbles).T, results[f"0_{case}_out"]
        if out_dtype == INT32:
            assert (out == acc).all()
            continue
        y = acc * (x_scale[:, None].astype(np.float64) * w_scale)
        size = np.abs(y)
        if extras:
            y, size = y + bias + residual, size + np.abs(bias) + np.abs(residual)
        y = np.maximum(y, 0) if activation == RELU else y
        if out_dtype == INT8:
            exact = np.clip(y / OUT_SCALE, -128, 127)
            assert (np.abs(out - exact) <= 0.5 + 4 * np.finfo(np.float32).eps * size / OUT_SCALE).all(), case
        else:
            eps = 2.0**-8 if out_dtype == BFLOAT16 else 0.0
            assert (np.abs(out - y) <= eps * np.abs(y) + 4 * np.finfo(np.float32).eps * size).all(), case
