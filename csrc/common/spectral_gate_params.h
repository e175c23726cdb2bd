// Sizes and strides of spectral_gate, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include "dtype.h"

namespace effvit {

struct SpectralGateParams {
  // Strides are in elements: of a weight's samples, a sample, a row and a column of the map.
  const void* x = nullptr;  // [G, N, H, W, C], last stride 1
  const float* weight = nullptr;  // [G, H, F, C, 2], contiguous
  void* out = nullptr;  // [G, N, H, W, C], contiguous

  // Backward only.
  const void* grad_out = nullptr;  // [G, N, H, W, C], last stride 1
  void* dx = nullptr;  // [G, N, H, W, C], contiguous
  float* dweight = nullptr;  // [G, H, F, C, 2], contiguous

  int64_t G = 0, N = 0, H = 0, W = 0, F = 0, C = 0;  // F = W/2 + 1
  int64_t x_stride_g = 0, x_stride_n = 0, x_stride_y = 0, x_stride_x = 0;
  int64_t grad_out_stride_g = 0, grad_out_stride_n = 0, grad_out_stride_y = 0, grad_out_stride_x = 0;

  DType dtype = DType::kFloat32;  // of x, out and their gradients
};

}  // namespace effvit
