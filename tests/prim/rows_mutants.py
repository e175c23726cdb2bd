"""Mutants of the row-wise kernels and of glu's functor."""

import ctypes

import numpy as np
from mutants import Mutant, call, check_seeds, pointer

HARNESS = "tests/prim/rows_harness.cpp"
KERNEL, PARAMS, MATH, GLU = "csrc/cuda/rows.cuh", "csrc/rows/params.h", "csrc/rows/math.h", "csrc/rows/glu.h"
# outer, inner, columns, strides of the two dims of a and b, act; float32
CASES = [
    (3, 5, 12, 100, 17, 0),  # sigmoid; whole pieces, not aligned
    (2, 3, 7, 30, 9, 1),  # gelu; nothing is aligned, tails
    (4, 2, 1, 5, 2, 2),  # silu; one column
    (2, 4, 20, 80, 20, 3),  # relu; aligned
    (1, 60, 9, 540, 9, 4),  # tanh; more pieces than a CTA has threads
]
NAMES = ("out", "da", "db")
MUTANTS = [
    Mutant("tail", KERNEL, "p.columns - column < kVec ? p.columns - column : kVec", "kVec", "outside|written"),
    Mutant("lost_step", KERNEL, "i < pieces; i += step", "i + 1 < pieces; i += step", ""),
    Mutant("lost_piece", KERNEL, "const int64_t pieces = p.rows * ceil_div(p.columns, tile::kVec<T>);",
           "const int64_t pieces = p.rows * ceil_div(p.columns, tile::kVec<T>) - 1;", ""),
    Mutant("alignment", KERNEL, "vec = vec && p.stride[i][k] % tile::kVec<T> == 0;", "", "align"),
    Mutant("row_of_outer", PARAMS, "(row - outer * p.size[k])", "(row - outer)", "outside"),
    Mutant("outer_stride", PARAMS, "return offset + row * p.stride[i][0];",
           "return offset + row * p.stride[i][1];", ""),
    Mutant("tensors_swapped", GLU, "out[1] = in[0] * in[1] * slope;", "out[1] = in[0] * in[2] * slope;", ""),
    Mutant("slope", GLU, "s * (1.f - s);", "s * (1.f + s);", ""),
    Mutant("density", GLU, "fma(b, density, half)", "fma(b, density, -half)", ""),
    Mutant("sign_of_tanh", MATH, "select(x < 0.f, -y, select(x == x, y, x))", "select(x == x, y, x)", ""),
    Mutant("other_tail", MATH, "select(x < 0.f, tail, 1.f - tail)", "select(x < 0.f, 1.f - tail, tail)", ""),
]  # fmt: skip


def inputs_of(case):
    """a, b in rows apart, grad_out."""
    outer, inner, columns, outer_stride, inner_stride, _ = CASES[case]
    random = np.random.default_rng(case)
    room = (outer - 1) * outer_stride + (inner - 1) * inner_stride + columns
    a, b = (random.standard_normal(room).astype(np.float32) * 2 for _ in range(2))
    return a, b, random.standard_normal((outer, inner, columns)).astype(np.float32)


def rows_of(case, x):
    outer, inner, columns, outer_stride, inner_stride, _ = CASES[case]
    strides = (outer_stride * 4, inner_stride * 4, 4)
    return np.lib.stride_tricks.as_strided(x, (outer, inner, columns), strides)


def run(library):
    for case, (*sizes, act) in enumerate(CASES):
        a, b, grad = inputs_of(case)
        results = [np.full(grad.shape, np.nan, np.float32) for _ in NAMES]
        tensors = (a, b, results[0], grad, *results[1:])
        addresses = (ctypes.c_void_p * len(tensors))(*[pointer(t).value for t in tensors])
        call(library.run_rows, (ctypes.c_int64 * 7)(*sizes, act, 0), addresses)
        for name, x in zip(NAMES, results, strict=True):
            yield f"{case}_{name}", np.nan_to_num(x.astype(np.float64), nan=1e9)


def check(results):
    import torch

    from effvit.ops.glu import NAMES as ACTIVATIONS
    from effvit.reference.glu import glu

    check_seeds(results)
    for case in range(len(CASES)):
        a, b, grad = inputs_of(case)
        leaves = [torch.from_numpy(rows_of(case, x).copy()).double().requires_grad_() for x in (a, b)]
        out = glu(*leaves, act=ACTIVATIONS[CASES[case][-1]])
        truths = (out.detach(), *torch.autograd.grad(out, leaves, torch.from_numpy(grad).double()))
        for name, truth in zip(NAMES, truths, strict=True):
            np.testing.assert_allclose(results[f"0_{case}_{name}"], truth.numpy(), rtol=1e-6, atol=2e-6)
