// Whether a CUTLASS kernel takes a call, or why not: a rule of shapes, strides and addresses. No CUTLASS, no CUDA.
#pragma once
#include "../../common/sparse24_int8_linear_params.h"

namespace effvit {
namespace cuda {

enum class CutlassArch : int32_t { kNone = 0, kSm80 = 80, kSm90 = 90 };
constexpr int kCutlassOutputs = 5;  // places by DType; int32 stays empty

}  // namespace cuda
}  // namespace effvit
