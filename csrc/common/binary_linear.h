// binary_linear: declaration, limits, and the filling of its parameters.
#pragma once

#include "binary_linear_params.h"
#include "int8_epilogue.h"

namespace effvit::ops {

struct binary_linear : OpDefaults {
  static constexpr const char* kForward =
      "binary_linear(x: M V | uint8, weight: N V | uint8, x_scale: M | float32 strided, w_scale: N | float32 packed, "
      "bias?: N | float packed, residual?: M N | float; activation: int in 0..3 = 0, out_dtype: int in 0..4 = 0, "
      "out_scale: float? > 0 = None, depth: int in 0..16777216, unipolar: bool = False) -> out: M N | out_dtype";
  static constexpr const char* kEmpty = "M N";

  static void derive(Call& c) {
    const int64_t bytes = (c.integer("depth") + 7) / 8;
    effvit::check(c.dim("V") == bytes, c.op(), "x must be [M, V] with V = ceil(depth / 8) = ", bytes, ", got ",
                  Integers(c["x"]));
  }

  static void check(const Call& c) { check_epilogue(c); }

  static BinaryLinearParams params(const Call& c) {
    BinaryLinearParams p;
    take_epilogue(c, p);
    c.take("x", p.x, p.x_stride_m), c.take("weight", p.weight, p.weight_stride_n);
    p.depth = c.integer("depth"), p.V = c.dim("V"), p.unipolar = c.flag("unipolar");
    return p;
  }
};

}  // namespace effvit::ops
