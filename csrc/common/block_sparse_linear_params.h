// What the kernels of block_sparse_linear get. Plain data: no torch, no CUDA.
#pragma once
#include "int8_linear_params.h"

namespace effvit {

// Rows of a tensor whose leading dims may lie anyhow: row numbers count the last of `dims` fastest.
struct LeadingRows {
  static constexpr int kMostDims = 5;
  int64_t size[kMostDims] = {};
  int32_t dims = 0;
};

struct BlockSparseLinearParams {
  const void* x = nullptr;  // [M, K], last stride 1, rows at x_stride
  const void* values = nullptr;  // [Z, B, B], last stride 1
  const int32_t* crow = nullptr;  // [N / B + 1]
  const int32_t* columns = nullptr;  // [Z]
  const void* bias = nullptr;  // [N], contiguous, of bias_dtype; may be null
  const void* residual = nullptr;  // [M, N], last stride 1, rows at residual_stride, of residual_dtype; may be null
  void* out = nullptr;  // [M, N], contiguous

  // Backward only.
  const void* grad_out = nullptr;  // [M, N], last stride 1, rows at grad_out_stride
  void* dx = nullptr;  // [M, K], contiguous
  void* dvalues = nullptr;  // [Z, B, B], contiguous
  void* dbias = nullptr;  // [N], of bias_dtype; may be null
  void* dresidual = nullptr;  // [M, N], contiguous, of residual_dtype; may be null

  int64_t M = 0, N = 0, K = 0, Z = 0;
  int32_t B = 16;
  int64_t values_stride_z = 0, values_stride_i = 0;
  LeadingRows rows;
  int64_t x_stride[LeadingRows::kMostDims] = {}, residual_stride[LeadingRows::kMostDims] = {},
          grad_out_stride[LeadingRows::kMostDims] = {};
  DType bias_dtype = DType::kFloat32, residual_dtype = DType::kFloat32;
  DType dtype = DType::kFloat32;  // of all others
  Activation activation = Activation::kNone;
};

}  // namespace effvit
