// What the kernels of int8_matmul get, and how integer products end. Plain data: no torch, no CUDA.
#pragma once
#include "../rows/int_params.h"
#include "dtype.h"

namespace effvit {

// y = x multiplier / 2^shift to the nearest, ties to even, between low and high; multiplier 0: y = x. x is the exact
// sum, saturated at int32.
struct Rescale {
  int32_t multiplier = 0, shift = 0, low = 0, high = 0;
};

struct Int8MatmulParams {
  static constexpr int kMostDims = 4;
  const void* a = nullptr;  // [..., M, K], last stride 1, of a_dtype: int8, uint8 or int16
  const void* b = nullptr;  // [..., K, N], or [..., N, K] with transpose_b, last stride 1, of b_dtype
  void* out = nullptr;  // [..., M, N], contiguous, of out_dtype

  int64_t batches = 1, M = 0, N = 0, K = 0;
  int32_t dims = 0;  // that number the batches, outermost first
  int64_t size[kMostDims] = {}, a_stride[kMostDims] = {}, b_stride[kMostDims] = {};
  int64_t a_row = 0, b_row = 0;  // from one row of a matrix to the next
  bool transpose_b = false;
  DType a_dtype = DType::kInt8, b_dtype = DType::kInt8, out_dtype = DType::kInt32;
  Rescale rescale;
};

// Where matrix `batch` starts, in elements.
EFFVIT_HD int64_t matrix_start(const Int8MatmulParams& p, const int64_t* stride, int64_t batch) {
  int64_t offset = 0;
  for (int k = p.dims - 1; k >= 0; --k) {
    const int64_t outer = batch / p.size[k];
    offset += (batch - outer * p.size[k]) * stride[k];
    batch = outer;
  }
  return offset;
}

// The largest magnitude of an operand's numbers.
EFFVIT_HD int64_t largest_of(DType type) { return type == DType::kInt8 ? 128 : type == DType::kUInt8 ? 255 : 32768; }

}  // namespace effvit
