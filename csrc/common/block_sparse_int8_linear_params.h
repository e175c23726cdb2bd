// What the kernels of block_sparse_int8_linear get. Plain data: no torch, no CUDA.
#pragma once
#include "block_sparse_linear_params.h"

namespace effvit {

struct BlockSparseInt8LinearParams : Int8Epilogue {
  const int8_t* x = nullptr;  // [M, K], last stride 1
  const int8_t* values = nullptr;  // [Z, B, B], last stride 1
  const int32_t* crow = nullptr;  // [N / B + 1]
  const int32_t* columns = nullptr;  // [Z]
  int64_t K = 0, Z = 0;
  int32_t B = 16;
  int64_t x_stride_m = 0, values_stride_z = 0, values_stride_i = 0;
};

}  // namespace effvit
