// What the kernels of the int8 products get: sizes, strides, and the epilogue. Plain data: no torch, no CUDA.
#pragma once
#include "dtype.h"

namespace effvit {

enum class Activation : int32_t { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3 };

// out = act(acc * x_scale * w_scale + bias + residual), rounded to out_dtype; int8: divided by out_scale, to the
// nearest step, ties to even, saturating; int32: acc itself.
struct Int8Epilogue {
  const float* x_scale = nullptr;  // [M], any stride
  const float* w_scale = nullptr;  // [N], contiguous
  const void* bias = nullptr;  // [N], contiguous, of bias_dtype; may be null
  const void* residual = nullptr;  // [M, N], last stride 1, of residual_dtype; may be null
  void* out = nullptr;  // [M, N], contiguous, of out_dtype

  int64_t M = 0, N = 0;
  int64_t x_scale_stride = 0, residual_stride_m = 0;
  DType bias_dtype = DType::kFloat32, residual_dtype = DType::kFloat32, out_dtype = DType::kFloat32;
  Activation activation = Activation::kNone;
  float out_scale = 1.f;
};

struct Int8LinearParams : Int8Epilogue {
  const int8_t* x = nullptr;  // [M, K], last stride 1
  const int8_t* weight = nullptr;  // [N, K], last stride 1; or, packed, [ceil(N / 16), 64 * (ceil(K / 4) + 1)]
  int64_t K = 0;
  int64_t x_stride_m = 0, weight_stride_n = 0;
  bool packed = false;
};

}  // namespace effvit
