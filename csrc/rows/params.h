// What a row-wise kernel gets: up to six tensors of the same rows, element by element. No torch, no CUDA.
#pragma once
#include <utility>

#include "../common/dtype.h"

namespace effvit {

namespace ops {
struct EFFVIT_OP;
}

struct RowsData {
  static constexpr int kMost = 6, kMostDims = 5;
  void* data[kMost] = {};  // the inputs, then the outputs: [rows, columns] each, last stride 1
  int64_t stride[kMost][kMostDims] = {};  // of the dims that the rows are numbered by, outermost first
  int64_t size[kMostDims] = {};
  int32_t dims = 0;
  int64_t rows = 0, columns = 0;
  int32_t variant = 0;  // a template argument of the functor
  DType dtype = DType::kFloat32;  // of every tensor
};

// A type for each op: kernels are found by it.
template <class Op>
struct RowsParams : RowsData {};

// Calls f with the variant as a constant.
template <int... kVariants, class F>
EFFVIT_HD void dispatch_variant(int variant, std::integer_sequence<int, kVariants...>, const F& f) {
  ((variant == kVariants ? f(std::integral_constant<int, kVariants>{}) : void()), ...);
}

// Where row `row` of tensor `i` starts, in elements.
EFFVIT_HD int64_t row_offset(const RowsData& p, int i, int64_t row) {
  int64_t offset = 0;
  for (int k = p.dims - 1; k > 0; --k) {
    const int64_t outer = row / p.size[k];
    offset += (row - outer * p.size[k]) * p.stride[i][k];
    row = outer;
  }
  return offset + row * p.stride[i][0];
}

}  // namespace effvit
