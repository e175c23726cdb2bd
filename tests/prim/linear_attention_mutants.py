"""Mutants of the linear attention kernels."""

import ctypes
import functools

import numpy as np
from mutants import Mutant, bf16, bf16_values, call, check_seeds, from_bf16, nbytes, pointer

HARNESS = "tests/prim/linear_attention_harness.cpp"
COMMON, STATE, OUTPUT, FUSED = (
    f"csrc/cuda/linear_attention_{part}.cuh" for part in ("common", "state", "output", "fused")
)
PRODUCT = "csrc/cuda/tile/product.cuh"
# B, L, M, H, K, V, feature map, normaliser, causal, quadratic; weight, q_den
CASES = [
    ((1, 260, 200, 1, 20, 16, 1, 1, 0, 0), True, False),  # several splits, and tiles a CTA
    ((1, 140, 140, 1, 20, 16, 2, 2, 1, 0), True, False),  # causal: two splits, padded columns that phi makes 1
    ((2, 20, 70, 1, 16, 12, 1, 1, 0, 1), False, True),  # quadratic: two key tiles
    ((1, 40, 30, 1, 72, 40, 1, 1, 0, 0), True, False),  # two blocks of rows and two slabs of the state
    ((1, 270, 150, 1, 36, 20, 2, 1, 0, 0), True, True),  # fused: a derivative between 0 and 1, several tiles a CTA
]
NAMES = ("out", "state", "z", "dq", "dk", "dv", "dweight", "dq_den")

MUTANTS = [
    Mutant("state_barrier", STATE,
           "        prim::sync_threads();  // this tile is complete, and the other buffer's readers are done\n"
           "        const int next_block = block + 1 == g.blocks",
           "        const int next_block = block + 1 == g.blocks", "race|uninitialised"),
    Mutant("walk_barrier", OUTPUT,
           "        prim::sync_warp();  // these rows are complete, and the other buffer's readers are done\n"
           "        const int next_block = block + 1 == blocks",
           "        const int next_block = block + 1 == blocks", "race|uninitialised"),
    Mutant("chunk_barrier", OUTPUT, "        prim::sync_threads();  // the readers of the state and of zvec\n", "",
           "race"),
    Mutant("den_buffer", OUTPUT, "          den_at = kTile - den_at;", "          den_at = 0;", "race"),
    Mutant("no_wait", STATE,
           "        prim::cp_async_wait<0>();\n        if constexpr (Wide<T>::kSplit) prim::sync_threads();",
           "        if constexpr (Wide<T>::kSplit) prim::sync_threads();", "before its wait"),
    Mutant("tail", COMMON, "const int n = first + row < stop ? length : 0;",
           "const int n = first + row <= stop ? length : 0;", "outside"),
    Mutant("padded_columns", COMMON, "x[e] = e < length ? x[e] * factor : 0.f;",
           "x[e] = length > 0 ? x[e] * factor : 0.f;"),
    Mutant("lost_slab", OUTPUT, "const int col = slab * g.slab_cols + piece;", "const int col = piece;",
           "written twice"),
    Mutant("lost_split", STATE, "    for (int k = 0; k < r.splits; ++k) {",
           "    for (int k = 1; k < r.splits; ++k) {"),
    Mutant("split_order", STATE, "(r.reverse ? r.splits - 1 - k : k)", "k"),
    Mutant("inclusive_prefix", STATE,
           "      if (r.prefix) prim::store_global(split, sum);\n      add_compensated(sum, low, part);",
           "      add_compensated(sum, low, part);\n      if (r.prefix) prim::store_global(split, sum);"),
    Mutant("sum_of_last_tile", STATE, "add_compensated(sum[e], low[e], part[e]);", "sum[e] = part[e];"),
    Mutant("sign", OUTPUT, "-(sum * (p.scale / d)) / d", "(sum * (p.scale / d)) / d"),
    Mutant("mask", OUTPUT, "return g.reverse() ? j < i : j > i;",
           "return g.reverse() ? j <= i : j >= i;"),
    Mutant("a_fragment", PRODUCT, "(a.row + k + at.low + at.quarter) * a.tile.stride + a.col + at.half",
           "(a.row + k + at.low + at.half) * a.tile.stride + a.col + at.quarter"),
    Mutant("b_fragment", PRODUCT,
           "if (both) prim::mma_m16n8k16<E>(acc[i + 1], hi, bf[2], bf[3]);\n      if constexpr",
           "if (both) prim::mma_m16n8k16<E>(acc[i + 1], hi, bf[0], bf[3]);\n      if constexpr"),
    Mutant("fused_query_tile", FUSED,
           "      prim::sync_threads();  // this tile is complete, and the other buffer's readers are done\n"
           "      at = 1 - at;",
           "      at = 1 - at;", "race|uninitialised"),
    Mutant("fused_query_results", FUSED,
           "      prim::sync_threads();  // the readers of x and of u: the results take x's place, the next tile u's\n",
           "", "race"),
    Mutant("fused_key_tile", FUSED,
           "      prim::sync_warp();  // these rows are complete, and the other buffer's readers are done\n"
           "      at = 1 - at;",
           "      at = 1 - at;", "race|uninitialised"),
    Mutant("fused_key_results", FUSED,
           "      prim::sync_warp();  // the readers of x and v, whose places the results take\n", "", "race"),
    Mutant("fused_sign", FUSED, "? 0.f : -1.f / d;", "? 0.f : 1.f / d;"),
    Mutant("fused_derivative", FUSED, "return map == FeatureMap::kElu1 && phi >= 1.f ? 1.f : phi;", "return phi;"),
    Mutant("fused_map", FUSED, "    apply_map(map, x);\n    EFFVIT_UNROLL\n    for (int e = 0; e < 4; ++e) pack_pair",
           "    EFFVIT_UNROLL\n    for (int e = 0; e < 4; ++e) pack_pair"),
    Mutant("fused_lost_warp", FUSED, "for (int w = 0; w < kWarps; ++w) total += c.zden()",
           "for (int w = 1; w < kWarps; ++w) total += c.zden()"),
    Mutant("fused_unweighted", FUSED, "dv[n][2 * half] * factor[half]", "dv[n][2 * half]"),
]  # fmt: skip


def inputs_of(case):
    """q, k, v, weight, q_den, grad_out in float32, of values that bfloat16 holds exactly."""
    (B, L, M, H, K, V, *_), weighted, den = CASES[case]
    values = functools.partial(bf16_values, np.random.default_rng(case))
    weight = 0.5 + np.abs(values(B, M, H)) if weighted else None
    q_den = values(B, L, H, K) if den else None
    return values(B, L, H, K), values(B, M, H, K), values(B, M, H, V), weight, q_den, values(B, L, H, V)


def run(library):
    for case, (sizes, *_) in enumerate(CASES):
        B, L, M, H, K, V, *_, quadratic = sizes
        q, k, v, weight, q_den, grad = inputs_of(case)
        half = [None if x is None else bf16(x) for x in (q, k, v, q_den, grad)]
        out, dq, dk, dv = (np.zeros(x.shape, np.uint16) for x in (grad, q, k, v))
        state, z = (None, None) if quadratic else (np.zeros((B, H, K, V), np.float32), np.zeros((B, H, K), np.float32))
        dweight = None if weight is None else np.zeros_like(weight)
        dq_den = None if q_den is None else np.zeros(q_den.shape, np.uint16)
        workspace = np.zeros(1 << 18, np.float32)
        tensors = [
            *half[:3], weight, half[3], out, state, z, half[4], dq, dk, dv, dweight, dq_den,
        ]  # fmt: skip
        addresses = (ctypes.c_void_p * len(tensors))(*[None if t is None else t.ctypes.data for t in tensors])
        call(
            library.run_linear_attention, (ctypes.c_int64 * len(sizes))(*sizes), addresses, pointer(workspace),
            nbytes(workspace),
        )  # fmt: skip
        for name, x in zip(NAMES, (out, state, z, dq, dk, dv, dweight, dq_den), strict=True):
            if x is not None:
                x = from_bf16(x) if x.dtype == np.uint16 else x
                yield f"{case}_{name}", x.astype(np.float64)


def formula(case, main, small):
    """Outputs and gradients of the reference; main: dtype of the tokens, small: of the weight."""
    import torch

    from effvit.reference.linear_attention import NORMALIZERS, linear_attention

    (*_, map_, normalize, causal, quadratic), *_ = CASES[case]
    dtypes = (main, main, main, small, main, main)
    tensors = [None if x is None else torch.from_numpy(x).to(t) for x, t in zip(inputs_of(case), dtypes, strict=True)]
    *inputs, grad = tensors
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    q, k, v, weight, q_den = inputs
    out, state, z = linear_attention(
        q, k, v, q_den, None, weight, feature_map=("none", "relu", "elu1", "exp")[map_],
        normalize=NORMALIZERS[normalize], eps=0.01, scale=0.5, causal=bool(causal), quadratic=bool(quadratic),
    )  # fmt: skip
    gradients = iter(torch.autograd.grad(out, leaves, grad))
    gradients = [None if t is None else next(gradients) for t in inputs]
    return [None if t is None else t.detach() for t in (out, state, z, *gradients)]


def check(results):
    import torch

    from effvit.testing import assert_close_to_truth

    check_seeds(results)
    for case in range(len(CASES)):
        truths = formula(case, torch.float64, torch.float64)
        yardsticks = formula(case, torch.bfloat16, torch.float32)
        for name, truth, yardstick in zip(NAMES, truths, yardsticks, strict=True):
            if f"0_{case}_{name}" in results:
                result = torch.from_numpy(results[f"0_{case}_{name}"])
                eps = torch.finfo(torch.bfloat16).eps
                assert_close_to_truth(result, truth, yardstick, eps=eps, name=f"{case}_{name}")
