// What the kernels of the operators on tables of levels get. Plain data: no torch, no CUDA.
#pragma once
#include "dtype.h"

namespace effvit {

struct LutParams {
  static constexpr int kMostDims = 5, kMostCodes = 256;
  const void* x = nullptr;  // rows of `columns` elements, last stride 1
  const float* thresholds = nullptr;  // [codes - 1], ascending; null: x are codes
  const float* values = nullptr;  // [codes]; null: results are codes
  void* out = nullptr;  // [rows, columns], contiguous

  int64_t rows = 0, columns = 0;
  int32_t dims = 0;  // that number the rows, outermost first
  int64_t size[kMostDims] = {}, x_stride[kMostDims] = {};
  int32_t codes = 0;
  bool descending = false;  // codes count from the largest x
  DType dtype = DType::kFloat32, out_dtype = DType::kFloat32;
};

// Where row `row` of x starts, in elements.
EFFVIT_HD int64_t row_start(const LutParams& p, int64_t row) {
  int64_t offset = 0;
  for (int k = p.dims - 1; k >= 0; --k) {
    const int64_t outer = row / p.size[k];
    offset += (row - outer * p.size[k]) * p.x_stride[k];
    row = outer;
  }
  return offset;
}

}  // namespace effvit
