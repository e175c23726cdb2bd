// pam_matmul: declaration, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "pam_matmul_params.h"

namespace effvit::ops {

struct pam_matmul : OpDefaults {
  static constexpr const char* kForward = "pam_matmul(x: M K, weight: N K) -> out: M N";
  static constexpr const char* kEmpty = "M N";

  static PamMatmulParams params(const Call& c) {
    PamMatmulParams p;
    c.take("x", p.x, p.x_stride_m), c.take("weight", p.weight, p.weight_stride_n), c.take("out", p.out);
    p.M = c.dim("M"), p.N = c.dim("N"), p.K = c.dim("K"), p.dtype = c["x"].dtype;
    return p;
  }
};

}  // namespace effvit::ops
