// What the kernels of int_attention get: sizes, strides, integers that stand for scales. Plain data: no torch, no CUDA.
#pragma once
#include "int8_matmul_params.h"

namespace effvit {

struct IntAttentionParams {
  const int8_t* q = nullptr;  // [B, L, H, K], last stride 1
  const int8_t* k = nullptr;  // [B, M, H, K], last stride 1
  const int8_t* v = nullptr;  // [B, M, H, V], last stride 1
  const int32_t* bias = nullptr;  // [W, H, L, M], last stride 1; may be null
  void* out = nullptr;  // [B, L, H, V], contiguous, of out_dtype

  int64_t B = 0, L = 0, M = 0, H = 0, K = 0, V = 0, W = 1;
  int64_t q_stride_b = 0, q_stride_l = 0, q_stride_h = 0;
  int64_t k_stride_b = 0, k_stride_l = 0, k_stride_h = 0;
  int64_t v_stride_b = 0, v_stride_l = 0, v_stride_h = 0;
  int64_t bias_stride_w = 0, bias_stride_h = 0, bias_stride_l = 0;
  ShiftExp exp;
  int32_t bits = 8;  // probabilities are below 2^(bits - 1)
  Rescale scores, rescale;  // of q k, of P v
  DType out_dtype = DType::kInt32;

  // A row's exponentials may exceed 2^31 - 1 together, which then counts as their sum, and its probabilities 1.
  EFFVIT_HD bool may_saturate() const {
    const int64_t one = static_cast<int64_t>(exp.x) << exp.n;
    return M > int64_t{0x7fffffff} / one;
  }
};

}  // namespace effvit
