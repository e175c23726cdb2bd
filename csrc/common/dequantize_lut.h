// dequantize_lut: declaration, checks, and the filling of its parameters.
#pragma once

#include "dequantize_lut_params.h"
#include "lut.h"

namespace effvit::ops {

struct dequantize_lut : OpDefaults {
  static constexpr const char* kForward =
      "dequantize_lut(q: ... C | uint8, values: V | float32 packed; out_dtype: int in 0..2 = 0) -> "
      "out: ... C | out_dtype";
  static constexpr const char* kEmpty = "... C";

  static void check(const Call& c) { check_count(c, "values", LutParams::kMostCodes); }

  static DequantizeLutParams params(const Call& c) { return lut_params<DequantizeLutParams>(c, c["q"], c["out"]); }
};

}  // namespace effvit::ops
