// What the kernels of quantize_lut get.
#pragma once
#include "lut_params.h"

namespace effvit {

// A type for each op: kernels are found by it.
struct QuantizeLutParams : LutParams {};

}  // namespace effvit
