// What the kernels of sign_bits get. Plain data: no torch, no CUDA.
#pragma once
#include "dtype.h"

namespace effvit {

struct SignBitsParams {
  static constexpr int kMostDims = 5;
  const void* x = nullptr;  // rows of `columns` elements, last stride 1
  const float* threshold = nullptr;  // one a row; null: 0
  uint8_t* bits = nullptr;  // [rows, ceil(columns / 8)], contiguous
  float* scale = nullptr;  // [rows], contiguous

  int64_t rows = 0, columns = 0;
  int32_t dims = 0;  // that number the rows, outermost first
  int64_t size[kMostDims] = {}, x_stride[kMostDims] = {}, threshold_stride[kMostDims] = {};
  DType dtype = DType::kFloat32;  // of x
};

// Where row `row` starts, in elements.
EFFVIT_HD int64_t row_start(const SignBitsParams& p, const int64_t* stride, int64_t row) {
  int64_t offset = 0;
  for (int k = p.dims - 1; k >= 0; --k) {
    const int64_t outer = row / p.size[k];
    offset += (row - outer * p.size[k]) * stride[k];
    row = outer;
  }
  return offset;
}

}  // namespace effvit
