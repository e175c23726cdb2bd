// Sizes and strides of newton_pinv, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include "dtype.h"

namespace effvit {

struct NewtonPinvParams {
  const void* a = nullptr;  // [B, H, m, m], last stride 1; forward only
  void* out = nullptr;  // [B, H, m, m], contiguous; an input of backward

  // Backward only.
  const void* grad_out = nullptr;  // [B, H, m, m], last stride 1
  void* da = nullptr;  // [B, H, m, m], contiguous

  int64_t B = 0, H = 0, m = 0;
  int64_t a_stride_b = 0, a_stride_h = 0, a_stride_i = 0;
  int64_t grad_out_stride_b = 0, grad_out_stride_h = 0, grad_out_stride_i = 0;

  int32_t iterations = 20;
  float ridge = 0.01f, step = 1.8f;
  DType dtype = DType::kFloat32;  // of every tensor
};

}  // namespace effvit
