// Sizes and strides of selective_scan2d, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include "dtype.h"

namespace effvit {

struct SelectiveScan2dParams {
  // Strides are in elements: of the batch, a row and a column of the map, and a direction.
  const void* x = nullptr;  // [B, H, W, D], last stride 1
  const void* dt = nullptr;  // [B, H, W, 4, D], last stride 1
  const void* b = nullptr;  // [B, H, W, 4, N], last stride 1
  const void* c = nullptr;  // [B, H, W, 4, N], last stride 1
  const float* a = nullptr;  // [4, D, N], contiguous
  const float* d = nullptr;  // [4, D], contiguous; null: 0
  const float* dt_bias = nullptr;  // [4, D], contiguous; null: 0
  float* out = nullptr;  // [B, H, W, D], contiguous

  // Backward only.
  const float* grad_out = nullptr;  // [B, H, W, D], contiguous
  void* dx = nullptr;  // [B, H, W, D], contiguous
  void* ddt = nullptr;  // [B, H, W, 4, D], contiguous
  void* db = nullptr;  // [B, H, W, 4, N], contiguous
  void* dc = nullptr;  // [B, H, W, 4, N], contiguous
  float* da = nullptr;  // [4, D, N], contiguous
  float* dd = nullptr;  // [4, D], contiguous; null exactly where d is
  float* ddt_bias = nullptr;  // [4, D], contiguous; null exactly where dt_bias is

  int64_t B = 0, H = 0, W = 0, D = 0, N = 0;
  int64_t x_stride_b = 0, x_stride_y = 0, x_stride_x = 0;
  int64_t dt_stride_b = 0, dt_stride_y = 0, dt_stride_x = 0, dt_stride_s = 0;
  int64_t b_stride_b = 0, b_stride_y = 0, b_stride_x = 0, b_stride_s = 0;
  int64_t c_stride_b = 0, c_stride_y = 0, c_stride_x = 0, c_stride_s = 0;

  bool softplus = true;
  DType dtype = DType::kFloat32;  // of x, dt, b, c and their gradients
};

}  // namespace effvit
