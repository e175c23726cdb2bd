// What the kernels of dequantize_lut get.
#pragma once
#include "lut_params.h"

namespace effvit {

// A type for each op: kernels are found by it.
struct DequantizeLutParams : LutParams {};

}  // namespace effvit
