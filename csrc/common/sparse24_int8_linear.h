// sparse24_int8_linear: declaration, limits, and the filling of its parameters.
#pragma once

#include "int8_epilogue.h"
#include "sparse24_int8_linear_params.h"
#include "sparse24_meta.h"

namespace effvit::ops {

struct sparse24_int8_linear : OpDefaults {
  static constexpr const char* kForward =
      "sparse24_int8_linear(x: M K | int8, values: R C | int8, meta?: N K8 | uint8 packed, " EFFVIT_INT8_EPILOGUE;
  static constexpr const char* kEmpty = "M N";

  static void derive(Call& c) {
    const int64_t n = c.dim("N"), k = c.dim("K"), r = c.dim("R"), width = c.dim("C");
    effvit::check(k <= kMaxInt8Depth, c.op(), "x must be [M, K] with K at most ", kMaxInt8Depth,
                  ", or the int32 sums could overflow, got ", Integers(c["x"]));
    effvit::check(k % 4 == 0, c.op(), "x must be [M, K] with K a multiple of 4, got ", Integers(c["x"]));
    c.dim("K8") = (k + 7) / 8;
    if (c.given("meta")) {
      effvit::check(r == n && width == k / 2, c.op(), "values must be [N, K / 2] = [", n, ", ", k / 2,
                    "] like w_scale and x, got ", Integers(c["values"]));
    } else {
      const int64_t rows = (n + 15) / 16, packed = 64 * (c.dim("K8") + (k + 31) / 32 + 2);
      effvit::check(r == rows && width == packed, c.op(), "values must be packed by sparse24_prepack, [", rows, ", ",
                    packed, "], where meta is not given, got ", Integers(c["values"]));
    }
  }

  static void check(const Call& c) {
    check_epilogue(c);
    if (!c.given("meta"))
      check_label(c, "values", "sparse24_prepack", Packed::kSparse24, c.dim("N"), c.dim("K"));
    else if (c.readable)
      check_positions(c, c["meta"]);
  }

  static Sparse24Int8LinearParams params(const Call& c) {
    Sparse24Int8LinearParams p;
    take_epilogue(c, p);
    c.take("x", p.x, p.x_stride_m), c.take("values", p.values, p.values_stride_n), c.take("meta", p.meta);
    p.K = c.dim("K");
    return p;
  }
};

}  // namespace effvit::ops
