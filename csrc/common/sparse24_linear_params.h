// Sizes and strides of sparse24_linear, by name. Plain data: no torch, no CUDA.
#pragma once
#include "dtype.h"

namespace effvit {

// Where the rows of a [..., columns] tensor start.
struct RowPlaces {
  static constexpr int kMostDims = 5;
  int64_t size[kMostDims] = {}, stride[kMostDims] = {};  // outermost first, in elements
  int32_t dims = 0;

  EFFVIT_HD int64_t operator()(int64_t row) const {
    int64_t offset = 0;
    for (int i = dims - 1; i > 0; --i) {
      const int64_t outer = row / size[i];
      offset += (row - outer * size[i]) * stride[i];
      row = outer;
    }
    return offset + row * stride[0];
  }
};

struct Sparse24LinearParams {
  const void* x = nullptr;  // [M, K], last stride 1
  const void* values = nullptr;  // [N, K / 2]
  const uint8_t* meta = nullptr;  // [N, ceil(K / 8)]
  const void* bias = nullptr;  // [N], contiguous; null: none
  void* out = nullptr;  // [M, N], contiguous

  // Backward only.
  const void* grad_out = nullptr;  // [M, N], last stride 1
  void* dx = nullptr;  // [M, K], contiguous
  void* dvalues = nullptr;  // [N, K / 2], contiguous
  void* dbias = nullptr;  // [N]; null: none

  RowPlaces x_rows, grad_out_rows;
  int64_t M = 0, N = 0, K = 0;
  int64_t values_stride_n = 0, values_stride_k = 0, meta_stride_n = 0, meta_stride_k = 0;
  DType dtype = DType::kFloat32, bias_dtype = DType::kFloat32;
};

}  // namespace effvit
