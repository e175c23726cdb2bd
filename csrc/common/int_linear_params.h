// What int_linear's kernels get: sizes, strides, and the epilogue of integers. Plain data: no torch, no CUDA.
#pragma once
#include "dtype.h"

namespace effvit {

// With t = saturating int32 of acc + bias: out = t * multiplier / 2^shift + residual * residual_multiplier /
// 2^residual_shift, rounded each to the nearest, ties to even, between low and high; without multiplier t itself.
struct IntEpilogue {
  const int32_t* multiplier = nullptr;  // [N], contiguous, as all vectors; null: none
  const int32_t* shift = nullptr;  // [N], 1 to 61
  const int32_t* bias = nullptr;  // [N]; may be null
  const void* residual = nullptr;  // [M, N], last stride 1, of residual_dtype; may be null
  const int32_t *residual_multiplier = nullptr, *residual_shift = nullptr;  // [N], of the residual
  void* out = nullptr;  // [M, N], contiguous, of out_dtype

  int64_t M = 0, N = 0;
  int64_t residual_stride_m = 0;
  int64_t largest_sum = 0;  // no |acc| is larger; below 2^31
  DType residual_dtype = DType::kInt32, out_dtype = DType::kInt32;
  int32_t low = 0, high = 0;  // ends of the result
};

struct IntLinearParams : IntEpilogue {
  const int8_t* x = nullptr;  // [M, K], last stride 1
  const int8_t* weight = nullptr;  // [N, K], last stride 1; or, packed, [ceil(N / 16), 64 * (ceil(K / 4) + 1)]
  int64_t K = 0;
  int64_t x_stride_m = 0, weight_stride_n = 0;
  bool packed = false;
};

}  // namespace effvit
