"""Mutants of the int8_attention kernels."""

import ctypes

import numpy as np
from mutants import Mutant, bf16, call, check_seeds, from_bf16, pointer

HARNESS = "tests/prim/int8_attention_harness.cpp"
FWD, QUANTISE = "csrc/cuda/int8_attention_fwd.cuh", "csrc/cuda/int8_attention_quantise.cuh"
COMMON, LAUNCH = "csrc/cuda/int8_attention_common.cuh", "csrc/cuda/int8_attention.cuh"
FLOAT32, BFLOAT16, FLOAT16, _, INT8 = range(5)
NUMPY = (np.float32, np.uint16, np.float16, np.int32, np.int8)
# B, L, H, K, M, G, V, W, elements between rows, dtype of q, of k and v, of the bias (None: there is none), causal,
# shiftmax
CASES = [
    (2, 70, 2, 20, 180, 2, 36, 1, 0, FLOAT32, FLOAT32, None, 1, 0),  # CTAs do several units; blocks masked and whole
    (1, 1, 3, 64, 400, 1, 64, 1, 0, BFLOAT16, INT8, None, 1, 0),  # a cache, aligned; split along its keys
    (2, 9, 2, 33, 70, 1, 7, 1, 1, FLOAT16, INT8, None, 0, 1),  # a cache, nothing aligned; rows of a tile are missing
    (2, 5, 4, 24, 140, 2, 130, 2, 0, FLOAT32, BFLOAT16, FLOAT32, 0, 1),  # the largest tiles; a bias for each sample
]
SCALE = 0.3

MUTANTS = [
    Mutant("unit_barrier", FWD, "    prim::sync_threads();  // the previous unit's readers\n", "", "race"),
    Mutant("step_barrier", FWD,
           "      prim::sync_threads();  // this block's tiles, and the last block's readers, over which it copies\n",
           "", "race|uninitialised"),
    Mutant("late_wait", FWD, "      prim::cp_async_wait<0>();\n", "      prim::cp_async_wait<1>();\n",
           "before its wait"),
    Mutant("query_barrier", FWD, "    prim::sync_warp();  // a warp reads its own rows\n", "", "race|uninitialised"),
    Mutant("one_stage", FWD, "kStages = 2", "kStages = 1", "race|before its wait"),
    Mutant("row_bound", FWD, "r < rows ? n : 0", "r <= rows ? n : 0", "outside"),
    Mutant("column_bound", FWD, "piece_length<int8_t>(from.cols - col), rows", "piece_length<int8_t>(16), rows",
           "outside"),
    Mutant("query_bound", FWD, "n = exists ? K - col : 0;", "n = exists ? 4 : 0;", "outside"),
    Mutant("lost_row", FWD, "      if (row >= g.rows) continue;\n", "", "outside|written twice"),
    Mutant("score_depth", FWD, "ceil_div(g.p.K, 32)) * 32", "ceil_div(g.p.K, 64)) * 32"),
    Mutant("score_fragment", FWD, "(at.low + at.quarter) * S::kStride + 2 * at.half",
           "(at.low + at.half) * S::kStride + 2 * at.quarter"),
    Mutant("key_order", FWD, "p[n / 4][n % 4 + half]", "p[n / 4][n % 4 / 2 + 2 * half]"),
    Mutant("value_order", FWD, "prim::permute_bytes(b[0], b[1], 0x6420)", "prim::permute_bytes(b[0], b[1], 0x5410)"),
    Mutant("value_fragment", FWD, "(32 * s + prim::lane_id()) * S::kStride", "prim::lane_id() * S::kStride"),
    Mutant("channel_order", FWD, "e % 2 == 0 ? even[2 * i + e / 2] : odd[2 * i + e / 2]",
           "e / 2 == 0 ? even[2 * i + e % 2] : odd[2 * i + e % 2]"),
    Mutant("scale_of_channel", FWD, "(16 * c + prim::lane_id() % 4 * 4);\n      EFFVIT_UNROLL",
           "(prim::lane_id() % 4 * 4);\n      EFFVIT_UNROLL"),
    Mutant("no_rescaling", FWD, "fmaf(out[c][i][e], keep[i], ", "fmaf(out[c][i][e], 1.f, "),
    Mutant("total_not_rescaled", FWD, "fmaf(total[i], keep[i], weight[i] * static_cast",
           "fmaf(total[i], 1.f, weight[i] * static_cast"),
    Mutant("half_the_weights", FWD, "      prim::mma_m16n8k32(sums, p[1], 0x01010101u, 0x01010101u);\n", ""),
    Mutant("carry_of_bytes", FWD, ">> 1) & 0x7f7f7f7fu", ">> 1)"),
    Mutant("visible", FWD, "8 * n + e % 2 <= left[e / 2]", "8 * n + e % 2 < left[e / 2]"),
    Mutant("whole_blocks", FWD, "u.first() / g.E) / kTile)", "last_row / g.E) / kTile)"),
    Mutant("last_block", FWD, "ceil_div(visible_keys(g.p, last_row / g.E), kTile)",
           "ceil_div(visible_keys(g.p, u.first() / g.E), kTile)"),
    Mutant("fraction", FWD, "bits & 0x1fffu", "bits & 0xfffu"),
    Mutant("exponent", FWD, "kPositive + 7 * 8192.f", "kPositive + 6 * 8192.f"),
    Mutant("shift_exponential", FWD, "16384 - (u & 8191)", "8192 - (u & 8191)"),
    Mutant("bias_of_sample", FWD, "b % g.p.W * g.p.bias_stride_w", "b / g.p.W * g.p.bias_stride_w"),
    Mutant("bias_in_base_2", FWD, "prim::product(b, kLog2e)", "b"),
    Mutant("head_of_group", FWD, "group * g.E + (row - l * g.E)", "group + (row - l * g.E) * g.p.G"),
    Mutant("scale_of_keys", FWD, "(u.b * g.p.N + n) * g.p.G + u.group)", "(u.b * g.p.N + n) * g.p.G)"),
    Mutant("part_of_mean", FWD, "part.store(row, g.p.scale * sum)", "part.store(row, sum)"),
    Mutant("maximum_of_split", FWD, "      merge_maximum(top, prim::load_global(g.partial_stats + at), keep, weight);",
           "      merge_maximum(top, 0.f, keep, weight);"),
    Mutant("split_of_total", FWD, "g.partial_stats + g.splits * count + at", "g.partial_stats + at"),
    Mutant("split_walk", LAUNCH, "g.splits = ceil_div(p.N, g.walk)", "g.splits = p.N / g.walk"),
    Mutant("workspace", LAUNCH, "end += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;",
           "end += ceil_div(count * static_cast<int64_t>(sizeof(T)), 32) * 16;", "outside"),
    Mutant("alignment", LAUNCH, "aligned16(p.k, 1, {p.k_stride_b, p.k_stride_m, p.k_stride_h})",
           "aligned16(p.k, 16, {p.k_stride_b, p.k_stride_m, p.k_stride_h})", "not aligned"),
    Mutant("steps_of_128", COMMON, "kSteps / x : 0.f", "(kSteps + 1.f) / x : 0.f"),
    Mutant("packed_bytes", COMMON, "0x5410", "0x1054"),
    Mutant("mean_of_missing", QUANTISE, " || row >= x.rows) return;", ") return;"),
    Mutant("keys_of_block", QUANTISE, "if (key + j < count) sum +=", "if (key + j + 1 < count) sum +="),
    Mutant("maxima_barrier", QUANTISE, "      maxima.store_vec(kWarps + group * kMaxDim + col, top);\n    }\n"
           "    prim::sync_threads();\n", "      maxima.store_vec(kWarps + group * kMaxDim + col, top);\n    }\n",
           "race|uninitialised"),
    Mutant("block_barrier", QUANTISE, "    prim::sync_threads();  // the previous block's readers\n", "", "race"),
    Mutant("maxima_of_warps", QUANTISE, "for (int w = 0; w < kWarps; ++w)", "for (int w = 0; w < 1; ++w)"),
    Mutant("maxima_of_rows", QUANTISE, "for (int i = 0; i < kRowsAtOnce; ++i)", "for (int i = 0; i < 1; ++i)"),
    Mutant("mean_over_blocks", QUANTISE, "total / static_cast<float>(g.p.M)", "total / static_cast<float>(g.p.N)"),
]  # fmt: skip


def encoded(x, dtype):
    return bf16(x) if dtype == BFLOAT16 else x.astype(NUMPY[dtype])


def decoded(x, dtype):
    return (from_bf16(x) if dtype == BFLOAT16 else x).astype(np.float32)


def padded(x, columns):
    """x with more columns at the end, of noise."""
    return np.concatenate((x, np.full((*x.shape[:-1], columns), 77, x.dtype)), -1)


def inputs_of(case):
    """q, k, v, k_scale, v_scale, k_mean, bias, as the dtypes hold them."""
    B, L, H, K, M, G, V, W, _, q_dtype, kv_dtype, bias_dtype, _, _ = CASES[case]
    random = np.random.default_rng(case)

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    q, bias = encoded(normal(B, L, H, K), q_dtype), None
    if bias_dtype is not None:
        bias = encoded(normal(W, H, L, M), bias_dtype)
    if kv_dtype != INT8:
        k = normal(B, M, G, K) + 50 * normal(B, 1, G, K)
        return q, encoded(k, kv_dtype), encoded(normal(B, M, G, V), kv_dtype), None, None, None, bias
    N = -(-M // 64)
    k, v = (random.integers(-127, 128, (B, M, G, n)).astype(np.int8) for n in (K, V))
    k_scale, v_scale = (random.uniform(0.01, 0.03, s).astype(np.float32) for s in ((B, N, G), (B, N, G, V)))
    return q, k, v, k_scale, v_scale, normal(B, G, K), bias


def run(library):
    for case, (B, L, H, K, M, G, V, W, gap, q_dtype, kv_dtype, bias_dtype, causal, shiftmax) in enumerate(CASES):
        q, k, v, *rest = inputs_of(case)
        out, lse = np.zeros((B, L, H, V), NUMPY[q_dtype]), np.zeros((B, H, L), np.float32)
        tensors = [*(padded(t, gap) for t in (q, k, v)), *rest, out, lse]
        addresses = (ctypes.c_void_p * len(tensors))(*[pointer(t).value for t in tensors])
        sizes = [B, L, H, K, M, G, V, W, gap, q_dtype, kv_dtype, bias_dtype or 0, causal, shiftmax]
        call(library.run_int8_attention, (ctypes.c_int64 * len(sizes))(*sizes), addresses, ctypes.c_double(SCALE))
        yield f"{case}-out", decoded(out, q_dtype).astype(np.float64)
        yield f"{case}-lse", lse.astype(np.float64)


def check(results):
    import torch

    from effvit.testing import get_spec, oracle_of

    check_seeds(results)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8)
    for case, (*_, q_dtype, kv_dtype, bias_dtype, causal, shiftmax) in enumerate(CASES):
        kinds = [q_dtype, kv_dtype, kv_dtype, FLOAT32, FLOAT32, FLOAT32, bias_dtype]
        tensors = [
            None if x is None else torch.from_numpy(x if t == INT8 else decoded(x, t)).to(dtypes[t])
            for x, t in zip(inputs_of(case), kinds, strict=True)
        ]
        options = {"scale": SCALE, "causal": bool(causal), "exponential": shiftmax}
        out, lse = (torch.from_numpy(results[f"0_{case}-{name}"]) for name in ("out", "lse"))
        oracle = oracle_of(get_spec("int8_attention"), tensors, options, None)
        oracle.check_outputs((out.to(dtypes[q_dtype]), lse.float()))
