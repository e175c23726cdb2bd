// spectral_gate: declarations, limits, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "spectral_gate_params.h"

namespace effvit::ops {

struct spectral_gate : OpDefaults {
  static constexpr const char* kForward =
      "spectral_gate(x: G N H W C, weight: G H F C 2 | float32 packed) -> out: G N H W C";
  static constexpr const char* kBackward =
      "spectral_gate_backward(grad_out: G N H W C, x: G N H W C, weight: G H F C 2 | float32 packed) -> "
      "dx: G N H W C, dweight: G H F C 2 | float32";
  static constexpr const char* kEmpty = "G N H W C";

  static void derive(Call& c) {
    const int64_t bins = c.dim("W") / 2 + 1, expected[] = {c.dim("G"), c.dim("H"), bins, c.dim("C"), 2};
    effvit::check(c.dim("F") == bins, c.op(), "weight must be [G, H, W//2 + 1, C, 2] = ", Integers(expected, 5),
                  ", got ", Integers(c["weight"]));
  }

  static SpectralGateParams params(const Call& c) {
    SpectralGateParams p;
    c.take("x", p.x, p.x_stride_g, p.x_stride_n, p.x_stride_y, p.x_stride_x);
    c.take("weight", p.weight), c.take("out", p.out);
    c.take("grad_out", p.grad_out, p.grad_out_stride_g, p.grad_out_stride_n, p.grad_out_stride_y, p.grad_out_stride_x);
    c.take("dx", p.dx), c.take("dweight", p.dweight);
    p.G = c.dim("G"), p.N = c.dim("N"), p.H = c.dim("H"), p.W = c.dim("W"), p.F = c.dim("F"), p.C = c.dim("C");
    p.dtype = c["x"].dtype;
    return p;
  }
};

}  // namespace effvit::ops
