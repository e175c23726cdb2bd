"""Mutants of the fft_conv kernels."""

import ctypes
import dataclasses

import numpy as np
from mutants import Mutant, call, check_seeds, nbytes, pointer

HARNESS = "tests/prim/fft_conv_harness.cpp"
TRANSFORM, PASSES, SPECTRA, FUSED, LAUNCH = (
    f"csrc/cuda/fft_conv{part}.cuh" for part in ("_transform", "_passes", "_spectra", "_fused", "")
)
CAUSAL, SAME, CIRCULAR = range(3)
NAMES = ("u", "pregate", "postgate", "k", "k_rev", "d", "spectrum")


@dataclasses.dataclass(frozen=True)
class Case:
    B: int
    C: int
    S: tuple  # sizes, taps of k and of k_rev, transforms: of X, Y, Z
    K: tuple
    R: tuple
    N: tuple
    mode: tuple
    J: int = 1
    last: bool = False
    act: int = 0
    keep: tuple = (0, 0, 0)
    absent: tuple = ("k_rev", "spectrum")
    shared_bytes: int = 0  # of a CTA, at most; 0: the emulator's limit

    @property
    def shift(self):
        return tuple((k - 1) // 2 if m == SAME else 0 for m, k in zip(self.mode, self.K, strict=True))

    @property
    def sizes(self):
        axes = zip(self.S, self.K, self.R, self.N, self.shift, self.keep, strict=True)
        return [self.B, self.C, self.J, int(self.last), self.act, *(n for axis in axes for n in axis)]

    @property
    def options(self):
        modes = {f"mode_{a}": m for a, m in zip("xyz", self.mode, strict=True)}
        keeps = {f"keep_{a}": n for a, n in zip("xyz", self.keep, strict=True)}
        scale = 0.5 if "spectrum" in self.absent else 1.0
        return modes | keeps | {"act": self.act, "kernel_scale": scale}


ONE = (1, 1)
CASES = [
    # One axis in one kernel: an odd length, taps on both sides, factors 8, 3 and 5; shares of the rows.
    Case(15, 2, (*ONE, 199), (*ONE, 41), (*ONE, 9), (*ONE, 240), (CIRCULAR, CIRCULAR, SAME), act=1,
         absent=("spectrum",)),
    # The same from a spectrum, channels last, factors 2 and 13; an own kernel for each row.
    Case(2, 3, (*ONE, 52), (*ONE, 1), (*ONE, 1), (*ONE, 52), (CIRCULAR,) * 3, J=2, last=True, keep=(0, 0, 20),
         absent=("k", "k_rev", "postgate")),
    # One axis in passes: two groups of factors, 64 = 16 * 4.
    Case(3, 1, (*ONE, 96), (*ONE, 33), (*ONE, 1), (*ONE, 128), (CIRCULAR, CIRCULAR, CAUSAL), act=2, keep=(0, 0, 40),
         shared_bytes=256),
    # Three axes, and a prime number that is summed up from global memory.
    Case(2, 2, (2, 3, 37), (1, 2, 50), (2, 1, 4), (4, 4, 37), (CAUSAL, SAME, CIRCULAR), last=True,
         absent=("spectrum", "pregate"), shared_bytes=256),
]  # fmt: skip

MUTANTS = [
    Mutant("pass_barrier", TRANSFORM, "    prim::sync_threads();\n    if (!kInverse) length /= f;",
           "    if (!kInverse) length /= f;", "race|uninitialised"),
    Mutant("filled_barrier", FUSED,
           "    prim::sync_threads();\n    transform<false>(s, g.axes[2], w.plan, lines);",
           "    transform<false>(s, g.axes[2], w.plan, lines);", "race|uninitialised"),
    Mutant("readers_barrier", FUSED,
           "    prim::sync_threads();  // the readers of the lines\n  }\n}\n\n// Gradients of maps", "  }\n}\n//",
           "race"),
    Mutant("product_barrier", FUSED,
           "      multiply_lines<true>(w, y, y, lines, kernels);\n      prim::sync_threads();\n",
           "      multiply_lines<true>(w, y, y, lines, kernels);\n", "race"),
    Mutant("padding", FUSED, "i < w.g.size ? load_inputs<T>", "i <= w.g.size ? load_inputs<T>", "outside"),
    Mutant("odd_size", PASSES, "if (g.halved && z + 1 < g.p.Z) f(", "if (g.halved) f(", "outside|written twice"),
    Mutant("lost_part", PASSES, "if (g.halved && z + 1 < g.p.Z) f(", "if (false) f(", "unwritten"),
    Mutant("bank_padding", TRANSFORM, "return i + (i >> 4);", "return i - (i >> 4);", "race"),
    Mutant("twiddle_sign", TRANSFORM, "x[q] = x[q] * root<true>(axis, q * j * step);",
           "x[q] = x[q] * root<false>(axis, q * j * step);"),
    Mutant("quarter", TRANSFORM, "x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;",
           "x[0] = a + c, x[1] = b - d, x[2] = a - c, x[3] = b + d;"),
    Mutant("composite", TRANSFORM, "x[k1 + kA * k2] = y[k1][k2];", "x[k1 * kB + k2] = y[k1][k2];"),
    Mutant("odd_radix", TRANSFORM, "x[k] = even + odd, x[kR - k] = even - odd;",
           "x[k] = even - odd, x[kR - k] = even + odd;"),
    Mutant("any_factor", TRANSFORM, "part = part + x(e) * root<kInverse>(axis, at * scale);",
           "part = part + x(e) * root<kInverse>(axis, at);"),
    Mutant("octant", TRANSFORM, "  if (odd) s = -s;\n", ""),
    Mutant("frequency", TRANSFORM, "    scale *= f;\n", "", "race"),  # images that are none of each other
    Mutant("between", PASSES, "  if (j == 0) return x;\n", "  return x;\n"),
    Mutant("between_inverse", PASSES, "return x * root<kInverse>(g.axis, j", "return x * root<false>(g.axis, j"),
    Mutant("long_inverse", PASSES, "long_sum<kInverse>(g.axis,", "long_sum<false>(g.axis,"),
    Mutant("shift", SPECTRA, "wrapped(z + p.shift_z, NZ)}", "wrapped(z, NZ)}"),
    Mutant("reverse_taps", SPECTRA, "p.RX, p.RY, p.RZ, p, back);", "p.RX, p.RY, p.RZ, p, tap);"),
    Mutant("wrapped_taps", SPECTRA, "z < KZ; z += p.NZ)", "z < KZ; z += KZ)"),
    Mutant("keep", SPECTRA, "min_of(f, n - f) < keep;", "f < keep;"),
    Mutant("mirror", SPECTRA, "f.z < mirror.z ? load_half(g, matrix, f) : conjugate(load_half(g, matrix, mirror));",
           "f.z < mirror.z ? load_half(g, matrix, f) : load_half(g, matrix, mirror);"),
    Mutant("conjugate", SPECTRA, "conjugate(x.even) * y.even + conjugate(x.odd)", "x.even * y.even + conjugate(x.odd)"),
    Mutant("odd_lags", SPECTRA, "conjugate(x.odd * t * t) * y.even", "conjugate(x.odd) * y.even"),
    Mutant("coefficient", SPECTRA, "odd * Complex{1.f + w.re, w.im}", "odd * Complex{1.f + w.re, -w.im}"),
    Mutant("transposed", SPECTRA, "z = conjugate(k.a) * a + k_mirror.b * conjugate(b);",
           "z = conjugate(k.a) * a + k.b * conjugate(b);"),
    Mutant("half_weight", SPECTRA, "        weight *= 0.5f;  // sums are over half the size of the transform\n", ""),
    Mutant("lost_split", FUSED, "for (Index s = 1; s < w.splits; ++s)", "for (Index s = 2; s < w.splits; ++s)"),
    Mutant("slope", PASSES, "slope = half + x * density;", "slope = half;"),
    Mutant("skip", PASSES, "grad = grad + Complex{skip * sum.re, skip * sum.im};",
           "grad = grad + Complex{skip * sum.re, sum.im};"),
]  # fmt: skip


def inputs_of(case):
    """The seven tensors, None where absent, and the gradient of the output; in float32."""
    c, random = CASES[case], np.random.default_rng(case)
    shape = (c.B, 1, *c.S, c.C) if c.last else (c.B, c.C, *c.S, 1)
    shapes = dict.fromkeys(("u", "pregate", "postgate"), shape)
    shapes |= {"k": (c.J, c.C, *c.K), "k_rev": (c.J, c.C, *c.R), "d": (c.C,)}
    shapes["spectrum"] = (c.J, c.C, *c.N[:2], c.N[2] // 2 + 1, 2)
    tensors = {n: random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    grad = random.standard_normal(shape).astype(np.float32)
    return [None if n in c.absent else tensors[n] for n in NAMES], grad


def run(library):
    for case, c in enumerate(CASES):
        inputs, grad = inputs_of(case)
        out, gradients = np.zeros_like(grad), [None if x is None else np.zeros_like(x) for x in inputs]
        workspace = np.zeros(1 << 20, np.float32)
        tensors = [*inputs, out, grad, *gradients]
        addresses = (ctypes.c_void_p * len(tensors))(*[None if t is None else t.ctypes.data for t in tensors])
        library.effvit_emu_set_limits(0, c.shared_bytes)
        call(
            library.run_fft_conv, (ctypes.c_int64 * len(c.sizes))(*c.sizes), addresses, pointer(workspace),
            nbytes(workspace),
        )  # fmt: skip
        yield f"{case}_out", out.astype(np.float64)
        for name, x in zip(NAMES, gradients, strict=True):
            if x is not None:
                yield f"{case}_{name}", x.astype(np.float64)


def formula(case, dtype):
    """Output and gradients of the reference, by name."""
    import torch

    from effvit.reference.fft_conv import fft_conv

    inputs, grad = inputs_of(case)
    u, pregate, postgate, k, k_rev, d, spectrum = leaves = [
        None if x is None else torch.from_numpy(x).to(dtype).requires_grad_() for x in inputs
    ]
    out = fft_conv(u, k, d, pregate, postgate, k_rev, spectrum, **CASES[case].options)
    given = {n: t for n, t in zip(NAMES, leaves, strict=True) if t is not None}
    gradients = torch.autograd.grad(out, list(given.values()), torch.from_numpy(grad).to(dtype))
    return {"out": out.detach()} | dict(zip(given, gradients, strict=True))


def check(results):
    import torch

    from effvit.testing import assert_close_to_truth
    from effvit.testing.fft_conv import magnitudes

    check_seeds(results)
    for case, c in enumerate(CASES):
        inputs, grad = inputs_of(case)
        u, pregate, postgate, k, k_rev, d, spectrum = (
            None if x is None else torch.from_numpy(x).double() for x in inputs
        )
        eps = torch.finfo(torch.float32).eps
        arguments = (u, k, d, pregate, postgate, k_rev, spectrum)
        outputs, gradients = magnitudes(arguments, c.options, (torch.from_numpy(grad).double(),), eps)
        yardsticks = formula(case, torch.float32)
        for name, truth in formula(case, torch.float64).items():
            result = torch.from_numpy(results[f"0_{case}_{name}"])
            magnitude = outputs["out"] if name == "out" else gradients[name]
            assert_close_to_truth(
                result, truth, yardsticks[name], magnitude=magnitude, eps=eps, name=f"{case}_{name}"
            )  # fmt: skip
