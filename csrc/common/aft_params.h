// Sizes and strides of aft, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include "dtype.h"

namespace effvit {

struct AftParams {
  const void* q = nullptr;  // [B, L, C], last stride 1
  const void* k = nullptr;  // [B, M, C], last stride 1
  const void* v = nullptr;  // [B, M, C], last stride 1
  const void* bias = nullptr;  // [L, M], any strides; null: none
  void* out = nullptr;  // [B, L, C], contiguous
  float* mean = nullptr;  // [B, L', C], contiguous; L' is L, or 1 without a bias; an input of backward
  float* lse = nullptr;  // [B, L', C], contiguous; an input of backward

  // Backward only.
  const void* grad_out = nullptr;  // [B, L, C], last stride 1
  const float* grad_mean = nullptr;  // [B, L', C], contiguous; null: zeros
  const float* grad_lse = nullptr;  // [B, L', C], contiguous; null: zeros
  void* dq = nullptr;  // [B, L, C], contiguous
  void* dk = nullptr;  // [B, M, C], contiguous
  void* dv = nullptr;  // [B, M, C], contiguous
  void* dbias = nullptr;  // [L, M], contiguous

  int64_t B = 0, L = 0, M = 0, C = 0;
  int64_t q_stride_b = 0, q_stride_l = 0;
  int64_t k_stride_b = 0, k_stride_l = 0;
  int64_t v_stride_b = 0, v_stride_l = 0;
  int64_t grad_out_stride_b = 0, grad_out_stride_l = 0;
  int64_t bias_stride_l = 0, bias_stride_m = 0;

  int64_t window = 0;  // the bias holds where |i - j| is below; 0: everywhere
  DType dtype = DType::kFloat32;  // of q, k, v, out and their gradients
  DType bias_dtype = DType::kFloat32;
};

}  // namespace effvit
