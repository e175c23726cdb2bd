"""Mutants of the int8_linear kernels."""

import ctypes

import numpy as np
from mutants import Mutant, bf16, call, check_seeds, from_bf16, pointer

HARNESS = "tests/prim/int8_linear_harness.cpp"
KERNEL, EPILOGUE = "csrc/cuda/int8_dense.cuh", "csrc/cuda/int8_epilogue.cuh"
TILES = "csrc/cuda/int8_tiles.cuh"
FLOAT32, BFLOAT16, FLOAT16, INT32, INT8 = range(5)
NUMPY = (np.float32, np.uint16, np.float16, np.int32, np.int8)
NONE, RELU, GELU, SILU = range(4)
# M, N, K, elements between rows, residual's dtype (None: neither it nor a bias), output's dtype, activation
CASES = [
    (150, 136, 200, 8, FLOAT32, BFLOAT16, GELU),  # the large tile; four of them, aligned, a step that is not full
    (20, 130, 100, 1, FLOAT16, INT8, SILU),  # the medium one; nothing is aligned, and rows of the result are not
    (
        5,
        442,
        698,
        6,
        BFLOAT16,
        FLOAT32,
        RELU,
    ),  # the small one; two tiles a CTA, six steps, aligned rows whose ends are not
    (9, 70, 40, 0, None, INT32, NONE),  # the sums themselves
]
OUT_SCALE = 0.02

MUTANTS = [
    Mutant("walk_barrier", KERNEL, "    prim::sync_threads();  // the previous tile's readers\n", "", "race"),
    Mutant("step_barrier", KERNEL,
           "      prim::sync_threads();  // this step's operands, and the last step's readers, over which it copies\n",
           "", "race|uninitialised"),
    Mutant("sums_barrier", KERNEL,
           "    prim::sync_threads();  // the readers of the operands, over which the sums are staged\n", "", "race"),
    Mutant("staged_barrier", KERNEL, "    stage<S>(sums, acc);\n    prim::sync_threads();\n",
           "    stage<S>(sums, acc);\n", "race|uninitialised"),
    Mutant("late_wait", KERNEL, "prim::cp_async_wait<S::kStages - 2>();", "prim::cp_async_wait<S::kStages - 1>();",
           "before its wait"),
    Mutant("early_copy", KERNEL, "load(step + S::kStages - 1);", "load(step + S::kStages);", "race|before its wait"),
    Mutant("no_empty_groups", KERNEL, "      prim::cp_async_commit();  // an empty", "      if (step < steps) "
           "prim::cp_async_commit();  // an empty", "before its wait"),
    Mutant("row_bound", TILES, "row + r < from.rows", "row + r <= from.rows", "outside"),
    Mutant("depth_bound", TILES, "? from.cols - col - c : 0", "? from.cols - col : 0", "outside"),
    Mutant("alignment", TILES, "aligned16(base, 1, {stride})}", "aligned16(base, 1, {})}", "not aligned"),
    Mutant("x_fragment", KERNEL, "(warp_row<S>() + at.low + at.half) * S::kStride + 2 * at.quarter",
           "(warp_row<S>() + at.low + at.quarter) * S::kStride + 2 * at.half"),
    Mutant("weight_fragment", KERNEL, "(warp_col<S>() + at.low + at.quarter) * S::kStride + 2 * at.half",
           "(warp_col<S>() + at.low + at.half) * S::kStride + 2 * at.quarter"),
    Mutant("half_the_depth", KERNEL, "k < S::kDepth; k += 32", "k < S::kDepth / 2; k += 32"),
    Mutant("staged_half", KERNEL, "acc[m][n][2 * half], acc[m][n][2 * half + 1]",
           "acc[m][n][half], acc[m][n][2 + half]"),
    Mutant("lost_tile", KERNEL, "const Place at = {row, col,", "const Place at = {0, col,", "written twice"),
    Mutant("scale_of_row", EPILOGUE, "p.x_scale + row * p.x_scale_stride", "p.x_scale + r * p.x_scale_stride"),
    Mutant("scale_of_column", EPILOGUE, "x_scale * scale[i + e], bias[i + e]", "x_scale * scale[e], bias[i + e]"),
    Mutant("bias_of_column", EPILOGUE, "load_small(p.bias, at.col + col + e,", "load_small(p.bias, col + e,"),
    Mutant("residual_of_column", EPILOGUE, "+ at.col + col + i, n - i,", "+ at.col + col, n - i,"),
    Mutant("residual_vector", EPILOGUE, "vec.residual && n - i >= 4", "vec.residual", "outside"),
    Mutant("residual_after_activation", EPILOGUE, "y = activate(p.activation, y + residual[e]);",
           "y = activate(p.activation, y) + residual[e];"),
    Mutant("wraps", EPILOGUE, "prim::round_to_int(math::min(127.f, math::max(-128.f, y)))", "prim::round_to_int(y)"),
    Mutant("step_of_output", EPILOGUE, "? y * inverse : y", "? y * p.out_scale : y"),
    Mutant("columns_bound", EPILOGUE, "at.col + col, out, n, vec.out);", "at.col + col, out, kVec<Out>, vec.out);",
           "outside|written twice"),
    Mutant("rows_bound", EPILOGUE, "r < at.rows; r += kRowStep", "r <= at.rows; r += kRowStep",
           "outside|written twice"),
]  # fmt: skip


def padded(x, columns):
    """x with more columns at the end, of noise."""
    wide = np.full((x.shape[0], x.shape[1] + columns), 77, x.dtype)
    wide[:, : x.shape[1]] = x
    return wide


def inputs_of(case):
    """x, weight, x_scale, w_scale, bias, residual in float32."""
    M, N, K, _, residual, _, _ = CASES[case]
    random = np.random.default_rng(case)
    x, weight = (random.integers(-128, 128, s).astype(np.int8) for s in ((M, K), (N, K)))
    x_scale = random.uniform(0.5, 1.5, M).astype(np.float32)
    w_scale = (random.uniform(0.5, 1.5, N) / (2500 * K**0.5)).astype(np.float32)
    if residual is None:
        return x, weight, x_scale, w_scale, None, None
    return x, weight, x_scale, w_scale, *(random.standard_normal(s).astype(np.float32) for s in (N, (M, N)))


def encoded(x, dtype):
    return bf16(x) if dtype == BFLOAT16 else x.astype(NUMPY[dtype])


def run(library):
    for case, (M, N, K, gap, residual_dtype, out_dtype, activation) in enumerate(CASES):
        x, weight, x_scale, w_scale, bias, residual = inputs_of(case)
        x, weight = padded(x, gap), padded(weight, gap)
        if residual is not None:
            residual = padded(encoded(residual, residual_dtype), gap)
        out = np.zeros((M, N), NUMPY[out_dtype])
        tensors = [x, weight, x_scale, w_scale, bias, residual, out]
        addresses = (ctypes.c_void_p * len(tensors))(*[pointer(t).value for t in tensors])
        sizes = [M, N, K, K + gap, K + gap, N + gap, residual_dtype or 0, out_dtype, activation]
        call(library.run_int8_linear, (ctypes.c_int64 * len(sizes))(*sizes), addresses, ctypes.c_double(OUT_SCALE))
        yield f"{case}", (from_bf16(out) if out_dtype == BFLOAT16 else out).astype(np.float64)


def check(results):
    import torch

    from effvit.testing import get_spec, oracle_of

    check_seeds(results)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8)
    for case, (*_, residual_dtype, out_dtype, activation) in enumerate(CASES):
        tensors = [None if x is None else torch.from_numpy(x) for x in inputs_of(case)]
        if residual_dtype is not None:
            tensors[-1] = tensors[-1].to(dtypes[residual_dtype])
        options = {
            "activation": activation,
            "out_dtype": out_dtype,
            "out_scale": OUT_SCALE if out_dtype == INT8 else None,
        }
        oracle = oracle_of(get_spec("int8_linear"), tensors, options, None)
        oracle.check_outputs((torch.from_numpy(results[f"0_{case}"]).to(dtypes[out_dtype]),))
