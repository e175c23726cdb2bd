"""Mutants of the rbf_gram kernels."""

import ctypes
import functools

import numpy as np
from mutants import Mutant, bf16, bf16_values, call, check_seeds, from_bf16, nbytes, pointer

HARNESS = "tests/prim/rbf_gram_harness.cpp"
COMMON, FORWARD, BACKWARD = (f"csrc/cuda/rbf_gram_{part}.cuh" for part in ("common", "fwd", "bwd"))
ROWS, PRODUCT = "csrc/cuda/tile/rows.cuh", "csrc/cuda/tile/product.cuh"
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
# B, L, M, H, D, dtype
CASES = [
    (1, 70, 72, 1, 40, BFLOAT16),  # rows of vectors; two tiles of queries and of keys, dk in two pieces
    (3, 72, 9, 2, 20, FLOAT16),  # tiles that are one block; a CTA walks over queries, rows of P are scaled
    (1, 81, 31, 1, 72, FLOAT32),  # float32: two chunks of columns, dk in two pieces
    (2, 5, 67, 1, 9, BFLOAT16),  # nothing is aligned: element by element
]
NAMES = ("out", "dq", "dk")
GAMMA = 0.75

MUTANTS = [
    Mutant("load_barrier", FORWARD, "      prim::sync_threads();  // the buffers' previous readers\n", "", "race"),
    Mutant("norms_barrier", FORWARD,
           "prim::sync_threads();  // and the readers of q, over which the result is staged\n",
           "", "race|uninitialised"),
    Mutant("stage_barrier", FORWARD,
           "    prim::sync_threads();  // the readers of q, over which the result is staged\n",
           "", "race"),
    Mutant("staged_barrier", FORWARD, "    prim::sync_threads();\n    store_tile(g,", "    store_tile(g,",
           "race|uninitialised"),
    Mutant("walk_barrier", BACKWARD, "    prim::sync_threads();  // the previous tiles' readers\n", "", "race"),
    Mutant("in_place_barrier", BACKWARD,
           "        prim::sync_threads();  // the readers of q, over which dq is computed\n",
           "", "race"),
    Mutant("warp_barrier", BACKWARD, "  prim::sync_warp();\n  store_rows(x,", "  store_rows(x,", "race|uninitialised"),
    Mutant("no_wait", FORWARD,
           "      prim::cp_async_wait<0>();\n      prim::sync_threads();\n      distances.add(",
           "      prim::sync_threads();\n      distances.add(", "before its wait"),
    Mutant("row_bound", COMMON, "row < rows ? from.dim", "row <= rows ? from.dim", "outside"),
    Mutant("column_bound", ROWS, "return left < 0 ? 0 : left > kVec<T> ? kVec<T> : left;",
           "return left <= 0 ? 0 : kVec<T>;", "outside"),
    Mutant("stored_rows", BACKWARD, "return row < rows ? to +", "return row <= rows ? to +", "outside|written twice"),
    Mutant("block_tail", COMMON, "kFlatVectors ? count / kVec<T> * kVec<T> : 0",
           "kFlatVectors ? round_up(count, kVec<T>) : 0",
           "outside|written twice"),
    Mutant("short_block", BACKWARD, "const int count = rows * cols, whole = count / kVec<T> * kVec<T>;",
           "const int count = (rows - 1) * cols, whole = count / kVec<T> * kVec<T>;", "uninitialised"),
    Mutant("unclear_columns", BACKWARD, "clear_columns(products, keys);", "clear_columns(products, round_up(keys, 8));",
           "uninitialised"),
    Mutant("unclear_rows", BACKWARD, "for (int i = rows * kTile + prim::thread_id(); i < kTile * kTile;",
           "for (int i = rows * kTile + prim::thread_id(); i < 0;", "uninitialised"),
    Mutant("lost_tile", FORWARD, "static_cast<T*>(g.p.out) + (bh * g.p.L + qt * kTile) * g.p.M + kt * kTile",
           "static_cast<T*>(g.p.out) + (bh * g.p.L + qt * kTile) * g.p.M", "written twice"),
    Mutant("a_fragment", PRODUCT, "(a.row + at.low + at.half) * a.tile.stride + a.col + k + at.quarter",
           "(a.row + at.low + at.quarter) * a.tile.stride + a.col + k + at.half"),
    Mutant("b_fragment", PRODUCT, "(b.row + k + at.low + at.half) * b.tile.stride + b.col + n * 8 + at.quarter",
           "(b.row + k + at.low + at.quarter) * b.tile.stride + b.col + n * 8 + at.half"),
    Mutant("norm_of_row", FORWARD, "{norms.load(row), norms.load(row + 8)}", "{norms.load(row), norms.load(row)}"),
    Mutant("norm_of_key", FORWARD, "norms.load_vec<Vec<float, 2>>(kTile + n * 8 + column)",
           "norms.load_vec<Vec<float, 2>>(n * 8 + column)"),
    Mutant("transposed", BACKWARD, "p[n][2 * half] = products.load(j * kProductStride + i);",
           "p[n][2 * half] = products.load(i * kProductStride + j);"),
    Mutant("no_rescale", BACKWARD, "        sum[r] *= ratio;\n", ""),
    Mutant("scale_of_row", BACKWARD, "p[n][e] *= scale[e / 2];", "p[n][e] *= scale[e % 2];"),
    Mutant("lost_split", BACKWARD, "for (int s = 0; s < g.splits; ++s)", "for (int s = 1; s < g.splits; ++s)"),
    Mutant("lost_chunk", BACKWARD,
           "+ kt * kTile) * g.partial_stride + tile.first;", "+ kt * kTile) * g.partial_stride;"),
    Mutant("sign", BACKWARD, "v.v[e] * sum[i] - acc[i][n][e]", "v.v[e] * sum[i] + acc[i][n][e]"),
]  # fmt: skip


def inputs_of(case):
    """q, k, grad_out in float32, of values that bfloat16 and float16 hold exactly."""
    B, L, M, H, D, dtype = CASES[case]
    values = functools.partial(bf16_values, np.random.default_rng(case))
    q, k, grad = values(B, L, H, D) / 4, values(B, M, H, D) / 4, values(B, H, L, M)
    if dtype == FLOAT16:  # later queries weigh more, so the scale of a row of P changes on the way
        grad *= np.where(np.arange(L) < 64, 2.0**-8, 16.0).astype(np.float32)[:, None]
    return tuple(x.astype(np.float16).astype(np.float32) for x in (q, k, grad))


def encoded(x, dtype):
    return bf16(x) if dtype == BFLOAT16 else x.astype(np.float16 if dtype == FLOAT16 else np.float32)


def decoded(x):
    return from_bf16(x) if x.dtype == np.uint16 else x


def run(library):
    for case, sizes in enumerate(CASES):
        B, L, M, H, _, dtype = sizes
        q, k, grad = (encoded(x, dtype) for x in inputs_of(case))
        out, dq, dk = np.zeros((B, H, L, M), grad.dtype), np.zeros_like(q), np.zeros_like(k)
        workspace = np.zeros(1 << 16, np.float32)
        tensors = [q, k, out, grad, dq, dk]
        addresses = (ctypes.c_void_p * len(tensors))(*[t.ctypes.data for t in tensors])
        call(
            library.run_rbf_gram, (ctypes.c_int64 * len(sizes))(*sizes), addresses, pointer(workspace),
            nbytes(workspace),
        )  # fmt: skip
        for name, x in zip(NAMES, (out, dq, dk), strict=True):
            yield f"{case}_{name}", decoded(x).astype(np.float64)


def formula(case, dtype):
    """Output and gradients of the reference."""
    import torch

    from effvit.reference.rbf_gram import rbf_gram

    q, k, grad = (torch.from_numpy(x).to(dtype) for x in inputs_of(case))
    leaves = [q.requires_grad_(), k.requires_grad_()]
    out = rbf_gram(*leaves, gamma=GAMMA)
    return [t.detach() for t in (out, *torch.autograd.grad(out, leaves, grad))]


def check(results):
    import torch

    from effvit.testing import assert_close_to_truth
    from effvit.testing.rbf_gram import magnitudes

    check_seeds(results)
    for case, sizes in enumerate(CASES):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[sizes[-1]]
        eps = torch.finfo(dtype).eps
        q, k, grad = (torch.from_numpy(x).double() for x in inputs_of(case))
        outputs, gradients = magnitudes((q, k), {"gamma": GAMMA}, (grad,), eps)
        sizes_of = dict(zip(NAMES, (outputs["out"], gradients["q"], gradients["k"]), strict=True))
        for name, truth, yardstick in zip(NAMES, formula(case, torch.float64), formula(case, dtype), strict=True):
            result = torch.from_numpy(results[f"0_{case}_{name}"])
            assert_close_to_truth(result, truth, yardstick, magnitude=sizes_of[name], eps=eps, name=f"{case}_{name}")
