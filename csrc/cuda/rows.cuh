// Row-wise operators on a GPU: the functor of rows/<op>.h element by element, in pieces of 16 bytes, over rows of any
// strides.
#pragma once
#include "../rows/params.h"
#include "common.cuh"
#include "math.cuh"
#include "tile/rows.cuh"

namespace effvit {
namespace cuda {
namespace EFFVIT_OP {

using namespace math;

#define EFFVIT_FN EFFVIT_DEVICE
#define EFFVIT_ROWS
#include EFFVIT_ROWS_HEADER
#undef EFFVIT_ROWS
#undef EFFVIT_FN

constexpr int kThreads = 256;

// The variant is looked up once a piece, which costs nothing beside memory, and one kernel compiles in the time of one.
template <template <int> class F, class T>
EFFVIT_KERNEL(kThreads, 4)
rows_kernel(RowsData p, int64_t pieces, bool vec) {
  constexpr int kVec = tile::kVec<T>, kInputs = F<0>::kInputs, kOutputs = F<0>::kOutputs;
  const int64_t per_row = ceil_div(p.columns, kVec);
  const int64_t step = static_cast<int64_t>(prim::cta_count()) * kThreads;
  EFFVIT_NO_UNROLL
  for (int64_t i = static_cast<int64_t>(prim::cta_id()) * kThreads + prim::thread_id(); i < pieces; i += step) {
    const int64_t row = i / per_row, column = (i - row * per_row) * kVec;
    const int n = static_cast<int>(p.columns - column < kVec ? p.columns - column : kVec);
    tile::Piece<T> x[kInputs], y[kOutputs];
    EFFVIT_UNROLL
    for (int k = 0; k < kInputs; ++k)
      x[k] = tile::load_piece(static_cast<const T*>(p.data[k]) + row_offset(p, k, row) + column, n, vec);
    dispatch_variant(p.variant, std::make_integer_sequence<int, kVariants>(), [&](auto variant) {
      EFFVIT_UNROLL
      for (int e = 0; e < kVec; ++e) {
        float in[kInputs], out[kOutputs];
        EFFVIT_UNROLL
        for (int k = 0; k < kInputs; ++k) in[k] = prim::to_float(x[k].v[e]);
        F<decltype(variant)::value>::apply(in, out);
        EFFVIT_UNROLL
        for (int k = 0; k < kOutputs; ++k) y[k].v[e] = prim::from_float<T>(out[k]);
      }
    });
    EFFVIT_UNROLL
    for (int k = 0; k < kOutputs; ++k) {
      const int t = kInputs + k;
      tile::store_piece(static_cast<T*>(p.data[t]) + row_offset(p, t, row) + column, y[k], n, vec);
    }
  }
}

// What the emulator may see of a tensor: from its first element to its last.
inline int64_t span_bytes(const RowsData& p, int i) {
  int64_t last = p.columns - 1;
  for (int k = 0; k < p.dims; ++k) last += (p.size[k] - 1) * p.stride[i][k];
  return (last + 1) * element_bytes(p.dtype);
}

template <template <int> class F>
cudaError_t launch_rows(const RowsData& p, cudaStream_t stream) {
  return dispatch_dtype<AllTypes>(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kInputs = F<0>::kInputs, kTensors = kInputs + F<0>::kOutputs;
    const int64_t pieces = p.rows * ceil_div(p.columns, tile::kVec<T>);
    bool vec = p.columns % tile::kVec<T> == 0 || p.rows == 1;
    prim::GlobalRanges ranges;
    for (int i = 0; i < kTensors; ++i) {
      vec = vec && reinterpret_cast<uintptr_t>(p.data[i]) % 16 == 0;
      for (int k = 0; k < p.dims; ++k) vec = vec && p.stride[i][k] % tile::kVec<T> == 0;
      if (i < kInputs) {
        ranges.read(p.data[i], span_bytes(p, i));
      } else {
        ranges.write(p.data[i], span_bytes(p, i));
      }
    }
    const int64_t most = 8 * prim::target_ctas(), ctas = ceil_div(pieces, kThreads);
    const cudaError_t error =
        EFFVIT_LAUNCH((rows_kernel<F, T>), ctas < most ? ctas : most, kThreads, 0, stream, p, pieces, vec);
    ranges.finish();
    return error;
  });
}

}  // namespace EFFVIT_OP
}  // namespace cuda
}  // namespace effvit
