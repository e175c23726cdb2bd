// What the kernels of fake_quantize_lut get.
#pragma once
#include "lut_params.h"

namespace effvit {

// A type for each op: kernels are found by it.
struct FakeQuantizeLutParams : LutParams {};

}  // namespace effvit
