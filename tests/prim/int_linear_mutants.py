"""Mutants of the int_linear kernels: of their epilogue. int8_linear's are of the walk over tiles, which both share."""

import ctypes

import numpy as np
from mutants import Mutant, call, check_seeds, pointer

HARNESS = "tests/prim/int_linear_harness.cpp"
KERNEL, EPILOGUE = "csrc/cuda/int_linear.cuh", "csrc/cuda/int_epilogue.cuh"
INT32, INT8, UINT8, INT16 = 3, 4, 5, 6  # DType
NUMPY = {INT32: np.int32, INT8: np.int8, UINT8: np.uint8, INT16: np.int16}
# M, N, K, elements between rows, residual's dtype (None: no residual), output's dtype, bits (None: no multiplier)
CASES = [
    (150, 136, 64, 16, INT16, INT16, 16),  # the large tile; everything is aligned
    (20, 130, 40, 1, INT8, INT8, 6),  # the medium one; nothing is
    (5, 442, 70, 6, UINT8, UINT8, 8),  # the small one; two tiles a CTA
    (9, 72, 40, 0, None, INT8, 8),
    (9, 70, 40, 0, None, INT32, None),  # the sums and the bias themselves, which saturate
    (9, 68, 40, 0, INT32, INT32, 32),
]

MUTANTS = [
    Mutant("row_of_residual", EPILOGUE, "row * p.residual_stride_m + first + i", "r * p.residual_stride_m + first + i"),
    Mutant("column_of_residual", EPILOGUE, "p.residual_stride_m + first + i", "p.residual_stride_m + first"),
    Mutant("residual_vector", EPILOGUE, "vec.residual && n - i >= 4", "vec.residual", "outside"),
    Mutant("residual_alignment", EPILOGUE, "p.residual_stride_m, element_bytes(p.residual_dtype), 4)",
           "0, element_bytes(p.residual_dtype), 4)", "not aligned"),
    Mutant("out_alignment", EPILOGUE, "aligned(p.out, p.N, out,", "aligned(p.out, 0, out,", "not aligned"),
    Mutant("residual_sign", EPILOGUE, "load_four(static_cast<const uint8_t*>(from) + at",
           "load_four(static_cast<const int8_t*>(from) + at"),
    Mutant("column_of_constants", EPILOGUE, "v == nullptr ? v : v + first", "v == nullptr ? v : v + col"),
    Mutant("constants_bound", EPILOGUE, "from != nullptr && e < n ?", "from != nullptr ?", "outside"),
    Mutant("wrong_shift", EPILOGUE, "c[i + e], z[e], m2[i + e], c2[i + e]", "c2[i + e], z[e], m2[i + e], c[i + e]"),
    Mutant("first_constants", EPILOGUE, "rescale(t, m[i + e], c[i + e]", "rescale(t, m[e], c[e]"),
    Mutant("wraps", EPILOGUE, "saturating_sum(acc.v[e], bias[i + e])",
           "static_cast<int32_t>(uint32_t(acc.v[e]) + uint32_t(bias[i + e]))"),
    Mutant("bias_after_rescaling", EPILOGUE, "y = rescale_sum(t, m[i + e], c[i + e], z[e]",
           "y = bias[i + e] + rescale_sum(acc.v[e], m[i + e], c[i + e], z[e]"),
    Mutant("columns_bound", EPILOGUE, "if (e < n) prim::store_global", "prim::store_global", "outside|written twice"),
    Mutant("rows_bound", EPILOGUE, "r < at.rows; r += kRowStep", "r <= at.rows; r += kRowStep",
           "outside|written twice"),
    Mutant("half_the_rows", EPILOGUE, "r < at.rows; r += kRowStep", "r < at.rows; r += 2 * kRowStep", "unwritten"),
    Mutant("no_residual", KERNEL, "return p.residual ? EFFVIT", "return !p.residual ? EFFVIT", "outside"),
]  # fmt: skip


def padded(x, columns):
    """x with more columns at the end, of noise."""
    wide = np.full((x.shape[0], x.shape[1] + columns), 77, x.dtype)
    wide[:, : x.shape[1]] = x
    return wide


def inputs_of(case):
    """x, weight, multiplier, shift, bias, residual, its multiplier and shift."""
    M, N, K, _, residual, out, bits = CASES[case]
    random = np.random.default_rng(case)

    def rescaling(low, high):
        m = random.integers(2**30, 2**31, N) * random.choice([-1, 1], N)
        return m.astype(np.int32), random.integers(low, high + 1, N).astype(np.int32)

    x, weight = (random.integers(-128, 128, s).astype(np.int8) for s in ((M, K), (N, K)))
    bias = random.integers(-3000, 3000, N).astype(np.int32)
    if bits is None:
        bias = np.where(bias < 0, bias - (2**31 - 3000), bias + (2**31 - 3001)).astype(np.int32)
        return x, weight, None, None, bias, None, None, None
    of_sum = rescaling(29, 33) if out in (INT16, INT32) else rescaling(40, 43)
    if residual is None:
        return x, weight, *of_sum, bias, None, None, None
    ends = np.iinfo(NUMPY[residual])
    values = random.integers(ends.min, ends.max + 1, (M, N)).astype(NUMPY[residual])
    return x, weight, *of_sum, bias, values, *rescaling(30, 33)


def ends_of(out, bits):
    info = np.iinfo(NUMPY[out])
    if bits is None:
        return info.min, info.max
    return (0, 2**bits - 1) if out == UINT8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def run(library):
    for case, (M, N, K, gap, residual_dtype, out_dtype, bits) in enumerate(CASES):
        x, weight, *vectors = inputs_of(case)
        x, weight = padded(x, gap), padded(weight, gap)
        if vectors[3] is not None:
            vectors[3] = padded(vectors[3], gap)
        tensors = [x, weight, *vectors, np.zeros((M, N), NUMPY[out_dtype])]
        addresses = (ctypes.c_void_p * len(tensors))(*[pointer(t).value for t in tensors])
        low, high = ends_of(out_dtype, bits)
        sizes = [M, N, K, K + gap, K + gap, N + gap, residual_dtype or INT32, out_dtype, low, high]
        call(library.run_int_linear, (ctypes.c_int64 * len(sizes))(*sizes), addresses)
        yield f"{case}", tensors[-1].astype(np.float64)


def check(results):
    import int_oracle

    check_seeds(results)
    for case, (*_, out, bits) in enumerate(CASES):
        expected = int_oracle.int_linear(*inputs_of(case), bits, NUMPY[out])
        assert (results[f"0_{case}"] == expected).all(), case
