// quantize_lut: declaration, checks, and the filling of its parameters.
#pragma once

#include "lut.h"
#include "quantize_lut_params.h"

namespace effvit::ops {

struct quantize_lut : OpDefaults {
  static constexpr const char* kForward =
      "quantize_lut(x: ... C, thresholds: T | float32 packed; descending: bool = False) -> q: ... C | uint8";
  static constexpr const char* kEmpty = "... C";

  static void check(const Call& c) { check_thresholds(c); }

  static QuantizeLutParams params(const Call& c) {
    auto p = lut_params<QuantizeLutParams>(c, c["x"], c["q"]);
    p.descending = c.flag("descending");
    return p;
  }
};

}  // namespace effvit::ops
