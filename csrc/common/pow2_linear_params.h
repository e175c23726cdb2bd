// What the kernels of pow2_linear get. Plain data: no torch, no CUDA.
#pragma once
#include "int8_linear_params.h"

namespace effvit {

struct Pow2LinearParams : Int8Epilogue {
  const void* x = nullptr;  // [M, K], last stride 1, of x_dtype
  const int8_t* weight = nullptr;  // [N, K], last stride 1: 0, or sign * (1 + exponent)
  int64_t K = 0;
  int64_t x_stride_m = 0, weight_stride_n = 0;
  int32_t bits = 4, right = 0;  // |code| < 2^(bits - 1); what all exponents are lower by
  DType x_dtype = DType::kInt8;
};

}  // namespace effvit
