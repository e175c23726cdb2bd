// pow2_linear: declaration, limits, and the filling of its parameters.
#pragma once

#include "int8_epilogue.h"
#include "pow2_linear_params.h"

namespace effvit::ops {

struct pow2_linear : OpDefaults {
  static constexpr const char* kForward =
      "pow2_linear(x: M K | integer, weight: N K | int8, x_scale: M | float32 strided, w_scale: N | float32 packed, "
      "bias?: N | float packed, residual?: M N | float; activation: int in 0..3 = 0, out_dtype: int in 0..4 = 0, "
      "out_scale: float? > 0 = None, bits: int in 2..5 = 4, right: int in 0..31 = 0) -> out: M N | out_dtype";
  static constexpr const char* kEmpty = "M N";

  static void derive(Call& c) {
    effvit::check(c.dim("K") <= kMaxInt8Depth, c.op(), "x must be [M, K] with K at most ", kMaxInt8Depth,
                  ", or the int32 sums could overflow, got ", Integers(c["x"]));
  }

  static void check(const Call& c) {
    check_epilogue(c);
    if (!c.readable) return;
    const View& w = c["weight"];
    const int bits = c.integer("bits"), most = (1 << (bits - 1)) - 1;
    const int offset = most, span = 2 * most;
    for (int64_t n = 0; n < w.size[0]; ++n) {
      const int8_t* const row = static_cast<const int8_t*>(w.data) + n * w.stride[0];
      uint8_t worst = 0;  // codes that are wrong wrap to more than span
      for (int64_t k = 0; k < w.size[1]; ++k) {
        const uint8_t above = static_cast<uint8_t>(row[k] + offset);
        worst = above > worst ? above : worst;
      }
      for (int64_t k = 0; worst > span && k < w.size[1]; ++k) {
        effvit::check(static_cast<uint8_t>(row[k] + offset) <= span, c.op(), "weight must be codes between -", most,
                      " and ", most, " with bits = ", bits, ", got ", static_cast<int>(row[k]));
      }
    }
  }

  static Pow2LinearParams params(const Call& c) {
    Pow2LinearParams p;
    take_epilogue(c, p);
    c.take("x", p.x, p.x_stride_m), c.take("weight", p.weight, p.weight_stride_n);
    p.K = c.dim("K"), p.x_dtype = c["x"].dtype, p.bits = c.integer("bits"), p.right = c.integer("right");
    return p;
  }
};

}  // namespace effvit::ops
