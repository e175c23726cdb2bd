// Sizes and strides of dwconv_glu, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include "dtype.h"

namespace effvit {

struct DwconvGluParams {
  const void* x = nullptr;  // [B, H, W, C], last stride 1: what is convolved
  const void* v = nullptr;  // [B, H, W, G], last stride 1: gates of the first G channels; null where G is 0
  const void* weight = nullptr;  // [C, k, k], contiguous
  const void* bias = nullptr;  // [C], contiguous, or null
  void* out = nullptr;  // [B, H, W, C], contiguous

  // Backward only. Pixels of dx and dv lie so far apart: they may be halves of one tensor.
  const void* grad_out = nullptr;  // [B, H, W, C], last stride 1
  void* dx = nullptr;  // [B, H, W, C]
  void* dv = nullptr;  // [B, H, W, G]; null where G is 0
  void* dweight = nullptr;  // [C, k, k], contiguous
  void* dbias = nullptr;  // [C], or null
  int64_t dx_stride = 0, dv_stride = 0;

  int64_t B = 0, H = 0, W = 0, C = 0, G = 0;
  int64_t x_stride_b = 0, x_stride_y = 0, x_stride_x = 0;
  int64_t v_stride_b = 0, v_stride_y = 0, v_stride_x = 0;
  int64_t grad_out_stride_b = 0, grad_out_stride_y = 0, grad_out_stride_x = 0;

  int32_t k = 3;  // odd
  int32_t act = 0;  // 0 sigmoid, 1 gelu, 2 silu, 3 relu, 4 tanh, 5 none
  DType dtype = DType::kFloat32;  // of every map
  DType weight_dtype = DType::kFloat32, bias_dtype = DType::kFloat32;
};

}  // namespace effvit
