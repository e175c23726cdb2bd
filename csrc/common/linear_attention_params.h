// Sizes and strides of linear_attention, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include "dtype.h"

namespace effvit {

// Values of the schema's ints; python/effvit/ops/linear_attention.py has the same lists.
enum class FeatureMap : int32_t { kNone = 0, kRelu = 1, kElu1 = 2, kExp = 3 };
enum class Normalize : int32_t { kNone = 0, kSum = 1, kMean = 2, kClamp = 3 };

struct LinearAttentionParams {
  // Inputs. A null pointer means that the argument was not given. All strides are in elements.
  const void* q = nullptr;  // [B, L, H, K], last stride 1
  const void* k = nullptr;  // [B, M, H, K], last stride 1
  const void* v = nullptr;  // [B, M, H, V], last stride 1
  const void* q_den = nullptr;  // [B, L, H, K], last stride 1; q where null
  const void* k_den = nullptr;  // [B, M, H, K], last stride 1; k where null
  const void* weight = nullptr;  // [B, M, H], any strides, weight_dtype
  const int32_t* cu_seqlens = nullptr;  // [N + 1], contiguous; then B is 1 and L is M
  const float* initial_state = nullptr;  // [N, H, K, V], contiguous
  const float* initial_z = nullptr;  // [N, H, K], contiguous; null exactly where initial_state is

  // Outputs of forward; state and z are inputs of backward. N is B without cu_seqlens.
  void* out = nullptr;  // [B, L, H, V], contiguous
  float* state = nullptr;  // [N, H, K, V], contiguous; null in the quadratic form
  float* z = nullptr;  // [N, H, K], contiguous; null in the quadratic form

  // Backward only. A null gradient is not wanted.
  const void* grad_out = nullptr;  // [B, L, H, V], last stride 1
  const float* grad_state = nullptr;  // [N, H, K, V], contiguous, may be null
  const float* grad_z = nullptr;  // [N, H, K], contiguous, may be null
  void* dq = nullptr;  // [B, L, H, K], contiguous
  void* dk = nullptr;  // [B, M, H, K], contiguous
  void* dv = nullptr;  // [B, M, H, V], contiguous
  void* dq_den = nullptr;  // [B, L, H, K], contiguous; null exactly where q_den is
  void* dk_den = nullptr;  // [B, M, H, K], contiguous; null exactly where k_den is
  void* dweight = nullptr;  // [B, M, H], contiguous, weight_dtype; null exactly where weight is
  float* dinitial_state = nullptr;  // [N, H, K, V], contiguous; null exactly where initial_state is
  float* dinitial_z = nullptr;  // [N, H, K], contiguous; null exactly where initial_z is

  int64_t B = 0, L = 0, M = 0, H = 0, K = 0, V = 0;
  int64_t N = 0;  // sequences: B, or the segments of cu_seqlens
  int64_t q_stride_b = 0, q_stride_l = 0, q_stride_h = 0;
  int64_t k_stride_b = 0, k_stride_l = 0, k_stride_h = 0;
  int64_t v_stride_b = 0, v_stride_l = 0, v_stride_h = 0;
  int64_t q_den_stride_b = 0, q_den_stride_l = 0, q_den_stride_h = 0;
  int64_t k_den_stride_b = 0, k_den_stride_l = 0, k_den_stride_h = 0;
  int64_t grad_out_stride_b = 0, grad_out_stride_l = 0, grad_out_stride_h = 0;
  int64_t weight_stride_b = 0, weight_stride_l = 0, weight_stride_h = 0;

  float eps = 1e-6f, clamp_min = 0.f, scale = 1.f;
  FeatureMap feature_map = FeatureMap::kRelu;
  Normalize normalize = Normalize::kSum;
  bool causal = false;
  bool quadratic = false;
  DType dtype = DType::kFloat32;  // q, k, v, q_den, k_den, out, grad_out and their gradients
  DType weight_dtype = DType::kFloat32;
};

// Tokens [begin, end) of a sequence; all of them without cu_seqlens.
struct LinearAttentionRange {
  int64_t batch, begin, end;
};

// Offsets outside [0, size] or out of order would be read from a GPU's memory unchecked: they are cut.
EFFVIT_HD LinearAttentionRange linear_attention_range(const LinearAttentionParams& p, int64_t sequence, int64_t size,
                                                      int32_t first, int32_t last) {
  if (p.cu_seqlens == nullptr) return {sequence, 0, size};
  const int64_t begin = first < 0 ? 0 : first > size ? size : first;
  const int64_t end = last < begin ? begin : last > size ? size : last;
  return {0, begin, end};
}

}  // namespace effvit
