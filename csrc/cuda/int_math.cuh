// rows/int_math.h for kernels with products: the shift exponential, x m / 2^c, and the end of an exact sum.
#pragma once
#include "../common/int_attention_params.h"
#include "tile/plan.cuh"

namespace effvit {
namespace cuda {
namespace int_impl {

using namespace tile;

#define EFFVIT_FN EFFVIT_DEVICE
template <class V>
EFFVIT_DEVICE V splat(uint32_t x) {
  return static_cast<V>(x);
}
#include "../rows/int_math.h"
#undef EFFVIT_FN

EFFVIT_DEVICE int32_t clamped(int64_t x, int32_t low, int32_t high) {
  return static_cast<int32_t>(x < low ? low : x > high ? high : x);
}
// An exact sum to a result: saturated at int32, rescaled.
template <class T>
EFFVIT_DEVICE int32_t finished(const Rescale& r, T sum) {
  const int32_t z = clamped(sum, INT32_MIN, INT32_MAX);
  return r.multiplier == 0 ? clamped(z, r.low, r.high) : rescale(z, r.multiplier, r.shift, r.low, r.high);
}
EFFVIT_DEVICE void store_integer(void* p, int64_t i, DType type, int32_t x) {
  if (type == DType::kInt32) {
    prim::store_global(static_cast<int32_t*>(p) + i, x);
  } else if (type == DType::kInt16) {
    prim::store_global(static_cast<int16_t*>(p) + i, static_cast<int16_t>(x));
  } else {  // the low byte, with or without a sign
    prim::store_global(static_cast<int8_t*>(p) + i, static_cast<int8_t>(x));
  }
}

}  // namespace int_impl
}  // namespace cuda
}  // namespace effvit
