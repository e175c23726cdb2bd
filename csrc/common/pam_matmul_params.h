// What the kernels of pam_matmul get. Plain data: no torch, no CUDA.
#pragma once
#include "dtype.h"

namespace effvit {

struct PamMatmulParams {
  const void* x = nullptr;  // [M, K], last stride 1, of dtype
  const void* weight = nullptr;  // [N, K], last stride 1, of dtype
  void* out = nullptr;  // [M, N], contiguous, of dtype

  int64_t M = 0, N = 0, K = 0;
  int64_t x_stride_m = 0, weight_stride_n = 0;
  DType dtype = DType::kFloat32;
};

}  // namespace effvit
