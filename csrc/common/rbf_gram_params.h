// Sizes and strides of rbf_gram, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include "dtype.h"

namespace effvit {

struct RbfGramParams {
  const void* q = nullptr;  // [B, L, H, D], last stride 1
  const void* k = nullptr;  // [B, M, H, D], last stride 1
  void* out = nullptr;  // [B, H, L, M], contiguous; an input of backward

  // Backward only.
  const void* grad_out = nullptr;  // [B, H, L, M], last stride 1
  void* dq = nullptr;  // [B, L, H, D], contiguous
  void* dk = nullptr;  // [B, M, H, D], contiguous

  int64_t B = 0, L = 0, M = 0, H = 0, D = 0;
  int64_t q_stride_b = 0, q_stride_l = 0, q_stride_h = 0;
  int64_t k_stride_b = 0, k_stride_l = 0, k_stride_h = 0;
  int64_t grad_out_stride_b = 0, grad_out_stride_h = 0, grad_out_stride_l = 0;

  float gamma = 0.5f;  // out = exp(-gamma |q - k|^2)
  DType dtype = DType::kFloat32;  // of every tensor
};

}  // namespace effvit
