// fake_quantize_lut: declaration, checks, and the filling of its parameters.
#pragma once

#include "fake_quantize_lut_params.h"
#include "lut.h"

namespace effvit::ops {

struct fake_quantize_lut : OpDefaults {
  static constexpr const char* kForward =
      "fake_quantize_lut(x: ... C, thresholds: T | float32 packed, values: T+1 | float32 packed) -> out: ... C";
  static constexpr const char* kEmpty = "... C";

  static void check(const Call& c) { check_thresholds(c); }

  static FakeQuantizeLutParams params(const Call& c) { return lut_params<FakeQuantizeLutParams>(c, c["x"], c["out"]); }
};

}  // namespace effvit::ops
