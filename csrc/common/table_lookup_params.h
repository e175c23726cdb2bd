// What the kernels of table_lookup get. Plain data: no torch, no CUDA.
#pragma once
#include "dtype.h"

namespace effvit {

struct TableLookupParams {
  static constexpr int kMostDims = 5;
  const uint8_t* x = nullptr;  // rows of `columns` bytes, last stride 1
  const uint8_t* table = nullptr;  // [T, 256], contiguous
  const uint8_t* which = nullptr;  // one a row, below T; null: 0
  uint8_t* out = nullptr;  // [rows, columns], contiguous

  int64_t rows = 0, columns = 0;
  bool is_signed = false;  // x are bytes of int8: tables begin with -128
  int32_t dims = 0;  // that number the rows, outermost first
  int64_t size[kMostDims] = {}, x_stride[kMostDims] = {}, which_stride[kMostDims] = {};
};

// Where row `row` starts, in elements.
EFFVIT_HD int64_t row_start(const TableLookupParams& p, const int64_t* stride, int64_t row) {
  int64_t offset = 0;
  for (int k = p.dims - 1; k >= 0; --k) {
    const int64_t outer = row / p.size[k];
    offset += (row - outer * p.size[k]) * stride[k];
    row = outer;
  }
  return offset;
}

}  // namespace effvit
