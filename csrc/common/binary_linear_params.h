// What the kernels of binary_linear get. Plain data: no torch, no CUDA.
#pragma once
#include "int8_linear_params.h"

namespace effvit {

struct BinaryLinearParams : Int8Epilogue {
  const uint8_t* x = nullptr;  // [M, V], last stride 1: bit k % 8 of byte k / 8
  const uint8_t* weight = nullptr;  // [N, V], last stride 1, likewise
  int64_t depth = 0, V = 0;  // V = ceil(depth / 8); bits from depth on do not count
  int64_t x_stride_m = 0, weight_stride_n = 0;
  bool unipolar = false;
};

}  // namespace effvit
