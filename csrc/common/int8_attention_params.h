// What the kernels of int8_attention get: sizes and strides by name. Plain data: no torch, no CUDA.
#pragma once
#include "dtype.h"

namespace effvit {

// Constants of the definition: see reference/int8_attention.py.
inline constexpr int kAttentionBlock = 64;  // keys that share a scale and a maximum
inline constexpr float kAttentionSmallest = 0x1p-100f;  // a row or block with none as large is zeros
inline constexpr float kExp2Limit = 65535.f, kShiftmaxLimit = 45589.f;  // steps of 2^-13 below the maximum

struct Int8AttentionParams {
  // A null pointer means that the argument was not given. All strides are in elements.
  const void* q = nullptr;  // [B, L, H, K], last stride 1, of dtype
  const void* k = nullptr;  // [B, M, G, K], last stride 1, of kv_dtype
  const void* v = nullptr;  // [B, M, G, V], last stride 1, of kv_dtype
  const float* k_scale = nullptr;  // [B, N, G], contiguous; exactly where k is int8
  const float* v_scale = nullptr;  // [B, N, G, V], contiguous; likewise
  const float* k_mean = nullptr;  // [B, G, K], contiguous
  const void* bias = nullptr;  // [W, H, L, M], last stride 1, of bias_dtype
  void* out = nullptr;  // [B, L, H, V], contiguous, of dtype
  float* lse = nullptr;  // [B, H, L], contiguous, natural log

  int64_t B = 0, L = 0, H = 0, K = 0, M = 0, G = 0, V = 0, W = 1;
  int64_t N = 0;  // blocks of keys
  int64_t q_stride_b = 0, q_stride_l = 0, q_stride_h = 0;
  int64_t k_stride_b = 0, k_stride_m = 0, k_stride_h = 0;
  int64_t v_stride_b = 0, v_stride_m = 0, v_stride_h = 0;
  int64_t bias_stride_w = 0, bias_stride_h = 0, bias_stride_l = 0;

  float scale = 1.f;  // of scores
  float base2_scale = 1.f;  // scale * log2(e), rounded once
  float step = 8192.f;  // from base 2 to steps of the exponential; of shiftmax: 8192 ln 2, rounded once
  bool causal = false, smooth_k = true, shiftmax = false;
  DType dtype = DType::kFloat32, kv_dtype = DType::kFloat32, bias_dtype = DType::kFloat32;
};

// How many keys query l sees: the last one sees all.
EFFVIT_HD int64_t visible_keys(const Int8AttentionParams& p, int64_t l) {
  const int64_t seen = l + 1 + p.M - p.L;
  return !p.causal ? p.M : seen < 0 ? 0 : seen;
}

}  // namespace effvit
