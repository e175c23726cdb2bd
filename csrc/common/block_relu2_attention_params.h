// Sizes and strides of block_relu2_attention, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include "dtype.h"

namespace effvit {

struct BlockRelu2AttentionParams {
  const void* q = nullptr;  // [B, L, K], last stride 1
  const void* k = nullptr;  // [B, L, K], last stride 1
  const void* v = nullptr;  // [B, L, V], last stride 1
  void* out = nullptr;  // [B, L, V], contiguous

  // Backward only.
  const void* grad_out = nullptr;  // [B, L, V], last stride 1
  void* dq = nullptr;  // [B, L, K], contiguous
  void* dk = nullptr;  // [B, L, K], contiguous
  void* dv = nullptr;  // [B, L, V], contiguous

  int64_t B = 0, L = 0, K = 0, V = 0;
  int64_t q_stride_b = 0, q_stride_l = 0;
  int64_t k_stride_b = 0, k_stride_l = 0;
  int64_t v_stride_b = 0, v_stride_l = 0;
  int64_t grad_out_stride_b = 0, grad_out_stride_l = 0;

  int64_t group = 256;  // tokens of a group, and what scores are divided by
  bool causal = false;
  DType dtype = DType::kFloat32;  // of every tensor
};

}  // namespace effvit
