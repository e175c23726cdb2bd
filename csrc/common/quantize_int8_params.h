// What the kernels of quantize_int8 get. Plain data: no torch, no CUDA.
#pragma once
#include "dtype.h"

namespace effvit {

struct QuantizeInt8Params {
  static constexpr int kMostDims = 5;
  const void* x = nullptr;  // rows of `columns` elements, last stride 1
  const float* scale = nullptr;  // one a row; null: from the row
  const int8_t* excluded = nullptr;  // [columns]: not 0 where a column is left out; may be null
  int8_t* q = nullptr;  // [rows, columns], contiguous
  float* out_scale = nullptr;  // [rows], contiguous

  int64_t rows = 0, columns = 0;
  int32_t dims = 0;  // that number the rows, outermost first
  int64_t size[kMostDims] = {}, x_stride[kMostDims] = {}, scale_stride[kMostDims] = {};
  bool away = false;  // ties away from zero; else to even
  DType dtype = DType::kFloat32;  // of x
};

// Where row `row` starts, in elements.
EFFVIT_HD int64_t row_start(const QuantizeInt8Params& p, const int64_t* stride, int64_t row) {
  int64_t offset = 0;
  for (int k = p.dims - 1; k >= 0; --k) {
    const int64_t outer = row / p.size[k];
    offset += (row - outer * p.size[k]) * stride[k];
    row = outer;
  }
  return offset;
}

}  // namespace effvit
