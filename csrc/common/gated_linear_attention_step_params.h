// Sizes and strides of gated_linear_attention_step, by name. Plain data: no torch, no CUDA.
#pragma once
#include "gated_linear_attention_params.h"

namespace effvit {

struct GatedLinearAttentionStepParams {
  // A null pointer means that the argument was not given. All strides are in elements.
  const void* q = nullptr;  // [B, H, K], last stride 1
  const void* k = nullptr;  // [B, H, K], last stride 1
  const void* v = nullptr;  // [B, H, V], last stride 1
  const void* g = nullptr;  // [H] or [B, H], any strides, or [B, H, K], last stride 1; gate_dtype
  const float* state = nullptr;  // [B, H, K, V], contiguous
  void* out = nullptr;  // [B, H, V], contiguous
  float* new_state = nullptr;  // [B, H, K, V], contiguous

  int64_t B = 0, H = 0, K = 0, V = 0;
  int64_t q_stride_b = 0, q_stride_h = 0;
  int64_t k_stride_b = 0, k_stride_h = 0;
  int64_t v_stride_b = 0, v_stride_h = 0;
  int64_t g_stride_b = 0, g_stride_h = 0;  // 0 for the dims that g lacks

  float scale = 1.f;
  GateKind gate = GateKind::kNone;
  DType dtype = DType::kFloat32;  // q, k, v and out
  DType gate_dtype = DType::kFloat32;
};

}  // namespace effvit
