// Sizes and strides of local_pool_attention, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include "dtype.h"

namespace effvit {

struct LocalPoolAttentionParams {
  const void* q = nullptr;  // [B, H, W, h, d], last stride 1; likewise k, v and grad_out
  const void* k = nullptr;
  const void* v = nullptr;
  const void* k_pool = nullptr;  // [B, P, h, d], last stride 1
  const void* v_pool = nullptr;  // [B, P, h, d], last stride 1
  const float* local_bias = nullptr;  // [h, T], T = window², or null; likewise the others of float32, contiguous
  const float* pool_bias = nullptr;  // [h, H*W, P]
  const float* q_scale = nullptr;  // [h, H*W]
  const float* q_embed = nullptr;  // [h, d]
  const float* tokens = nullptr;  // [h, d, T]
  const float* token_bias = nullptr;  // [h, T]
  void* out = nullptr;  // [B, H, W, h, d], contiguous

  // Backward only; results are contiguous.
  const void* grad_out = nullptr;
  void* dq = nullptr;
  void* dk = nullptr;
  void* dv = nullptr;
  void* dk_pool = nullptr;
  void* dv_pool = nullptr;
  float* dlocal_bias = nullptr;
  float* dpool_bias = nullptr;
  float* dq_scale = nullptr;
  float* dq_embed = nullptr;
  float* dtokens = nullptr;
  float* dtoken_bias = nullptr;

  int64_t B = 0, H = 0, W = 0, h = 0, d = 0, P = 0;
  int64_t q_stride_b = 0, q_stride_y = 0, q_stride_x = 0, q_stride_h = 0;
  int64_t k_stride_b = 0, k_stride_y = 0, k_stride_x = 0, k_stride_h = 0;
  int64_t v_stride_b = 0, v_stride_y = 0, v_stride_x = 0, v_stride_h = 0;
  int64_t k_pool_stride_b = 0, k_pool_stride_p = 0, k_pool_stride_h = 0;
  int64_t v_pool_stride_b = 0, v_pool_stride_p = 0, v_pool_stride_h = 0;
  int64_t grad_out_stride_b = 0, grad_out_stride_y = 0, grad_out_stride_x = 0, grad_out_stride_h = 0;

  int32_t window = 3;  // odd
  DType dtype = DType::kFloat32;  // of maps and pooled tokens
};

}  // namespace effvit
