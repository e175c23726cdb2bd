// int8_linear: declaration, limits, and the filling of its parameters.
#pragma once

#include "int8_epilogue.h"

namespace effvit::ops {

struct int8_linear : OpDefaults {
  static constexpr const char* kForward = "int8_linear(x: M K | int8, weight: R C | int8, " EFFVIT_INT8_EPILOGUE;
  static constexpr const char* kEmpty = "M N";

  static void derive(Call& c) {
    const int64_t n = c.dim("N"), k = c.dim("K"), rows = (n + 15) / 16, width = 64 * ((k + 3) / 4 + 1);
    effvit::check(k <= kMaxInt8Depth, c.op(), "x must be [M, K] with K at most ", kMaxInt8Depth,
                  ", or the int32 sums could overflow, got ", Integers(c["x"]));
    const bool plain = c.dim("R") == n && c.dim("C") == k, packed = c.dim("R") == rows && c.dim("C") == width;
    effvit::check(plain || packed, c.op(), "weight must be [N, K] = [", n, ", ", k, "] or packed by int8_prepack, [",
                  rows, ", ", width, "], like w_scale and x, got ", Integers(c["weight"]));
  }

  static void check(const Call& c) {
    check_epilogue(c);
    if (c.dim("C") > c.dim("K")) check_label(c, "weight", "int8_prepack", Packed::kInt8, c.dim("N"), c.dim("K"));
  }

  static Int8LinearParams params(const Call& c) {
    Int8LinearParams p;
    take_epilogue(c, p);
    c.take("x", p.x, p.x_stride_m), c.take("weight", p.weight, p.weight_stride_n);
    p.K = c.dim("K");
    p.packed = c.dim("C") > p.K;
    return p;
  }
};

}  // namespace effvit::ops
