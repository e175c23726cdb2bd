// The functions of rows/math.h for kernels: those that they are built on, of a float.
#pragma once
#include "prim/types.cuh"

namespace effvit {
namespace cuda {
namespace math {

#define EFFVIT_FN EFFVIT_DEVICE
template <class V>
EFFVIT_DEVICE V splat(float x) {
  return x;
}
EFFVIT_DEVICE float select(bool condition, float a, float b) { return condition ? a : b; }
EFFVIT_DEVICE float max(float a, float b) { return a > b ? a : b; }
EFFVIT_DEVICE float min(float a, float b) { return a < b ? a : b; }
EFFVIT_DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
EFFVIT_DEVICE float exp_full(float x) { return expf(x); }
#include "../rows/math.h"
#undef EFFVIT_FN

}  // namespace math
}  // namespace cuda
}  // namespace effvit
