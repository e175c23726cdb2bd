// Sizes and strides of rnn_scan, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include "dtype.h"

namespace effvit {

enum class RnnCell : int32_t { kLstm = 0, kGru = 1, kSlstm = 2 };

struct RnnScanParams {
  const void* x = nullptr;  // [B, L, G, H, D], last stride 1
  const void* weight = nullptr;  // [H, G, D, D], last stride 1
  const void* bias = nullptr;  // [G, H, D], last stride 1; null: none
  const float* initial = nullptr;  // [B, S, H, D], contiguous; null: none
  void* out = nullptr;  // [B, L, H, D], contiguous
  float* trace = nullptr;  // [B, L, S, H, D], contiguous; an input of backward

  // Backward only.
  const void* grad_out = nullptr;  // [B, L, H, D], last stride 1
  const float* grad_trace = nullptr;  // [B, L, S, H, D], contiguous; null: zeros
  void* dx = nullptr;  // [B, L, G, H, D], contiguous
  void* dweight = nullptr;  // [H, G, D, D], contiguous
  void* dbias = nullptr;  // [G, H, D], contiguous
  float* dinitial = nullptr;  // [B, S, H, D], contiguous

  int64_t B = 0, L = 0, G = 0, H = 0, D = 0, S = 0;
  int64_t x_stride_b = 0, x_stride_l = 0, x_stride_g = 0, x_stride_h = 0;
  int64_t weight_stride_h = 0, weight_stride_g = 0, weight_stride_o = 0;
  int64_t bias_stride_g = 0, bias_stride_h = 0;
  int64_t grad_out_stride_b = 0, grad_out_stride_l = 0, grad_out_stride_h = 0;

  RnnCell cell = RnnCell::kLstm;
  DType dtype = DType::kFloat32;  // of what is not a state
};

}  // namespace effvit
