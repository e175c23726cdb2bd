// What the kernels of several ops share beyond prim: small parameters of any dtype, launch arithmetic, dispatch.
#pragma once
#include <initializer_list>

#include "../common/dtype.h"
#include "prim/launch.cuh"

namespace effvit {
namespace cuda {

EFFVIT_HD int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }
EFFVIT_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
EFFVIT_HD int32_t round_up(int64_t a, int32_t b) { return static_cast<int32_t>(ceil_div(a, b)) * b; }

// Element i of a small tensor in whatever dtype it has.
EFFVIT_DEVICE float load_small(const void* p, int64_t i, DType type) {
  if (type == DType::kFloat32) return prim::load_global(static_cast<const float*>(p) + i);
  if (type == DType::kBFloat16) return prim::to_float(prim::load_global(static_cast<const prim::bfloat16*>(p) + i));
  return prim::to_float(prim::load_global(static_cast<const prim::float16*>(p) + i));
}
EFFVIT_DEVICE void store_small(void* p, int64_t i, DType type, float x) {
  if (type == DType::kFloat32) {
    prim::store_global(static_cast<float*>(p) + i, x);
  } else if (type == DType::kBFloat16) {
    prim::store_global(static_cast<prim::bfloat16*>(p) + i, prim::from_float<prim::bfloat16>(x));
  } else {
    prim::store_global(static_cast<prim::float16*>(p) + i, prim::from_float<prim::float16>(x));
  }
}

struct AllTypes {
  static constexpr bool kFloat32 = true, kBFloat16 = true, kFloat16 = true;
};

// Calls f with a value of the element type; Types says for which ones kernels are compiled.
template <class Types, class F>
cudaError_t dispatch_dtype(DType type, const F& f) {
  if constexpr (Types::kFloat32) {
    if (type == DType::kFloat32) return f(float{});
  }
  if constexpr (Types::kBFloat16) {
    if (type == DType::kBFloat16) return f(prim::bfloat16{});
  }
  if constexpr (Types::kFloat16) {
    if (type == DType::kFloat16) return f(prim::float16{});
  }
  return static_cast<cudaError_t>(1);  // cudaErrorInvalidValue
}

inline bool aligned16(const void* p, int64_t bytes_per_element, std::initializer_list<int64_t> strides) {
  bool ok = reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (const int64_t s : strides) ok = ok && s * bytes_per_element % 16 == 0;
  return ok;
}

}  // namespace cuda
}  // namespace effvit
