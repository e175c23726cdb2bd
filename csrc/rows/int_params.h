// What an integer row-wise kernel gets: rows of integers, and integers that stand for scales. No torch, no CUDA.
#pragma once
#include <utility>

#include "../common/dtype.h"

namespace effvit {

namespace ops {
struct EFFVIT_OP;
}

// Constants of the shift exponential: see rows/int_math.h.
struct ShiftExp {
  uint32_t x = 1;  // -x0
  uint32_t n = 0;
  uint32_t limit = 0;  // n * x
  uint32_t magic = 0, shift = 0;  // p / x = p * magic >> shift; of the high half of the product where that is `wide`
  uint32_t mask = ~uint32_t{0};  // ~1: the remainder is halved before the left shift
  bool wide = false;
};

struct IntRowsData {
  static constexpr int kMostDims = 5, kVectors = 8;
  const void* x = nullptr;  // rows of `columns` elements of x_dtype, last stride 1
  const void* residual = nullptr;  // likewise of residual_dtype, may be null
  DType x_dtype = DType::kInt32, residual_dtype = DType::kInt32;
  const int32_t* vectors[kVectors] = {};  // [columns] each, as the op orders them; may be null
  void* out = nullptr;  // [rows, columns], contiguous
  int16_t* sum = nullptr;  // likewise, of ops that add
  int64_t rows = 0, columns = 0;
  int32_t dims = 0;  // that number the rows, outermost first
  int64_t size[kMostDims] = {}, x_stride[kMostDims] = {}, residual_stride[kMostDims] = {};
  DType out_dtype = DType::kInt32;
  int32_t variant = 0;  // a template argument of the functor
  ShiftExp exp;
  int32_t bits = 0, low = 0, high = 0;  // low, high: ends of the result
  int32_t multiplier = 0, shift = 0;  // of a rescaling of all columns; multiplier 0: none
  double scale = 0;  // on a CPU, of the latter, where float64 can stand for it
  int32_t sum_low = 0, sum_high = 0;  // ends of the sum
  bool flags[3] = {};  // the op's own
};

// A type for each op: kernels are found by it.
template <class Op>
struct IntRowsParams : IntRowsData {};

// Calls f with the variant as a constant.
template <int... kVariants, class F>
EFFVIT_HD void dispatch_variant(int variant, std::integer_sequence<int, kVariants...>, const F& f) {
  ((variant == kVariants ? f(std::integral_constant<int, kVariants>{}) : void()), ...);
}

// Where row `row` starts, in elements.
EFFVIT_HD int64_t row_start(const IntRowsData& p, const int64_t* stride, int64_t row) {
  int64_t offset = 0;
  for (int k = p.dims - 1; k > 0; --k) {
    const int64_t outer = row / p.size[k];
    offset += (row - outer * p.size[k]) * stride[k];
    row = outer;
  }
  return offset + row * stride[0];
}

}  // namespace effvit
