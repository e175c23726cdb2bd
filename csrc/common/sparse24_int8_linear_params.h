// What the kernels of sparse24_int8_linear get. Plain data: no torch, no CUDA.
#pragma once
#include "int8_linear_params.h"

namespace effvit {

struct Sparse24Int8LinearParams : Int8Epilogue {
  const int8_t* x = nullptr;  // [M, K], last stride 1
  const int8_t* values = nullptr;  // [N, K / 2], last stride 1; or packed, see sparse24_int8_linear_kernel.inl.h
  const uint8_t* meta = nullptr;  // [N, ceil(K / 8)], contiguous; null: values are packed
  int64_t K = 0;
  int64_t x_stride_m = 0, values_stride_n = 0;
};

}  // namespace effvit
