"""Mutants of the newton_pinv kernels."""

import ctypes

import numpy as np
from mutants import Mutant, bf16, bf16_values, call, check_seeds, from_bf16, nbytes, pointer

HARNESS = "tests/prim/newton_pinv_harness.cpp"
PINV, BLOCK = "csrc/cuda/newton_pinv.cuh", "csrc/cuda/tile/block.cuh"
FLOAT32, BFLOAT16 = 0, 1
# B, H, m, steps, dtype
CASES = [
    (2, 4, 18, 4, FLOAT32),  # in shared memory: blocks beyond the matrix, two matrices a CTA
    (1, 2, 70, 3, BFLOAT16),  # in the workspace: tiles beyond the matrix, two matrices a CTA
]
NAMES = ("out", "da")
OPTIONS = {"ridge": 0.5, "step": 1.5}

MUTANTS = [
    Mutant("sums_barrier", PINV,
           "      row_sums.store(prim::thread_id(), sum);\n    }\n    prim::sync_threads();\n    Block mine",
           "      row_sums.store(prim::thread_id(), sum);\n    }\n    Block mine", "race|uninitialised"),
    Mutant("start_barrier", PINV,
           "    prim::sync_threads();\n    EFFVIT_NO_UNROLL\n    for (int i = 0; i < g.p.iterations; ++i) {\n"
           "      Block product",
           "    EFFVIT_NO_UNROLL\n    for (int i = 0; i < g.p.iterations; ++i) {\n      Block product",
           "race|uninitialised"),
    Mutant("step_barrier", PINV, "      prim::sync_threads();  // the readers of V\n", "", "race"),
    Mutant("matrix_barrier", PINV, "    prim::sync_threads();  // the previous matrix's readers\n", "", "race"),
    Mutant("stage_barrier", PINV, "        prim::sync_threads();  // the readers of this stage\n", "",
           "race|before its wait"),
    Mutant("product_barrier", PINV, "  prim::sync_threads();\n}\n\nEFFVIT_DEVICE void store_matrix",
           "}\n\nEFFVIT_DEVICE void store_matrix"),
    Mutant("no_wait", PINV, "          prim::cp_async_wait<0>();\n        }", "        }", "before its wait"),
    Mutant("wait_too_late", PINV, "prim::cp_async_wait<1>();", "prim::cp_async_wait<2>();", "before its wait"),
    Mutant("one_stage", PINV, "        stage = 1 - stage;\n", ""),
    Mutant("row_bound", PINV, "const bool inside = row < g.m &&", "const bool inside = row <= g.m &&", "outside"),
    Mutant("idle_threads", PINV,
           "row_sums(12 * floats, kTile);\n"
           "  const int row = prim::thread_id() / blocks * kMicro, col = prim::thread_id() % blocks * kMicro;\n"
           "  const bool active = row < g.pad;",
           "row_sums(12 * floats, kTile);\n"
           "  const int row = prim::thread_id() / blocks * kMicro, col = prim::thread_id() % blocks * kMicro;\n"
           "  const bool active = row <= g.pad;", "outside"),
    Mutant("tile_tail", PINV, "multiply(product, x, row, y, col, min_of(kTile, g.pad - k0));",
           "multiply(product, x, row, y, col, kTile);", "uninitialised"),
    Mutant("slices", PINV, "g.slices = backward ? 3 : 4;", "g.slices = 3;", "outside"),
    Mutant("head", PINV, "b * stride_b + (index - b * g.p.H) * stride_h", "b * stride_b + index * stride_h",
           "outside"),
    Mutant("lost_matrix", PINV, "store_small(to, index * g.m * g.m + i, g.p.dtype, from.load(",
           "store_small(to, i, g.p.dtype, from.load(", "written twice"),
    Mutant("uncovered", PINV, "for (int i = prim::thread_id(); i < g.m * g.m; i += kThreads) {\n"
           "    const int row = i / g.m;\n    store_small(to, index * g.m * g.m + i, g.p.dtype, from.load(",
           "for (int i = prim::thread_id(); i < (g.m - 1) * g.m; i += kThreads) {\n"
           "    const int row = i / g.m;\n    store_small(to, index * g.m * g.m + i, g.p.dtype, from.load(",
           "unwritten"),
    Mutant("transposed", PINV, "load_matrix(g, w, contiguous_at(g, g.p.out, index), true);",
           "load_matrix(g, w, contiguous_at(g, g.p.out, index), false);"),
    Mutant("transposed_large", PINV, "prim::store_global(w + col * g.pad + row, x);",
           "prim::store_global(w + row * g.pad + col, x);"),
    Mutant("sign", PINV, "half == 0 ? x : times(x, -1.f)", "x"),
    Mutant("element", BLOCK, "p[i] = kTransposed ? x[e].v[i] : x[i].v[e];", "p[i] = x[e].v[i];"),
    Mutant("largest", PINV, "y = z > y || z != z ? z : y;", "y = z;"),
    Mutant("row_sum", PINV,
           "      for (int k = 0; k < g.pad; k += 4) {\n        const auto x = p.load_vec",
           "      for (int k = 4; k < g.pad; k += 4) {\n        const auto x = p.load_vec"),
    Mutant("ridge_of_first_block", PINV, "  if (row == col) {", "  if (row == 0 && col == 0) {"),
    Mutant("swapped", PINV, "half == 0 ? v : t, half == 0 ? p : v,", "half == 0 ? v : t, half == 0 ? p : t,"),
]  # fmt: skip


def inputs_of(case):
    """a, grad_out in float32, of values that bfloat16 holds exactly; a has a dominant diagonal, is not symmetric, and
    its largest row sum is neither the first nor the last."""
    B, H, m, *_ = CASES[case]
    random = np.random.default_rng(case)
    a = np.abs(bf16_values(random, B, H, m, m)) + 2 * m**0.5 * np.eye(m)
    a[:, :, m // 3] *= 1.5
    return from_bf16(bf16(a)), bf16_values(random, B, H, m, m)


def run(library):
    for case, sizes in enumerate(CASES):
        half = sizes[-1] == BFLOAT16
        a, grad = (bf16(x) if half else x for x in inputs_of(case))
        out, da = np.zeros_like(a), np.zeros_like(a)
        workspace = np.zeros(1 << 16, np.float32)
        tensors = [a, out, grad, da]
        addresses = (ctypes.c_void_p * len(tensors))(*[t.ctypes.data for t in tensors])
        call(
            library.run_newton_pinv, (ctypes.c_int64 * len(sizes))(*sizes), addresses, pointer(workspace),
            nbytes(workspace),
        )  # fmt: skip
        for name, x in zip(NAMES, (out, da), strict=True):
            yield f"{case}_{name}", (from_bf16(x) if half else x).astype(np.float64)


def check(results):
    import torch

    from effvit.reference.newton_pinv import newton_pinv
    from effvit.testing import assert_close_to_truth
    from effvit.testing.newton_pinv import magnitudes

    def formula(a, grad, options):
        a.requires_grad_()
        out = newton_pinv(a, **options)
        return out.detach(), *torch.autograd.grad(out, [a], grad)

    check_seeds(results)
    for case, (*_, steps, kind) in enumerate(CASES):
        dtype = torch.bfloat16 if kind == BFLOAT16 else torch.float32
        eps, options = torch.finfo(dtype).eps, {**OPTIONS, "iterations": steps}
        a, grad = (torch.from_numpy(x) for x in inputs_of(case))
        outputs, gradients = magnitudes((a.double(),), options, (grad.double(),), eps)
        truths = formula(a.double(), grad.double(), options)
        yardsticks = formula(a.to(dtype), grad.to(dtype), options)
        scales = (outputs["out"], gradients["a"])
        for name, truth, yardstick, magnitude in zip(NAMES, truths, yardsticks, scales, strict=True):
            result = torch.from_numpy(results[f"0_{case}_{name}"])
            assert_close_to_truth(result, truth, yardstick, magnitude=magnitude, eps=eps, name=f"{case}_{name}")
