// The epilogue of the int8 products: from exact sums in shared memory to results in global memory, in one pass.
//
// The sums go through shared memory, though each is in a register of the thread that computed it: so a thread has
// neighbouring columns of one row, reads the residual and writes the result in whole sectors, and keeps the scales and
// the bias of its columns while it walks down the rows.
#pragma once
#include "../common/int8_linear_params.h"
#include "math.cuh"
#include "tile/plan.cuh"

namespace effvit {
namespace cuda {
namespace int8_impl {

using namespace tile;

// int32 from row to row of the sums: lanes that write pairs of columns of four rows meet no bank twice.
EFFVIT_HD constexpr int sum_stride(int cols) { return cols + 8; }

// Sums in shared memory, a row sum_stride(kCols) from the next.
template <int kCols>
struct StagedSums {
  Shared<int32_t> at;
  template <class V>
  EFFVIT_DEVICE V load_vec(int row, int col) const {
    return at.template load_vec<V>(row * sum_stride(kCols) + col);
  }
};

// Where a tile lies in the result, and how much of it there is.
struct Place {
  int64_t row, col;
  int rows, cols;
};

// Which accesses are whole vectors.
struct EpilogueAccess {
  bool out, residual;
};

inline EpilogueAccess epilogue_access(const Int8Epilogue& p) {
  const int64_t bytes = element_bytes(p.residual_dtype);
  return {aligned16(p.out, element_bytes(p.out_dtype), {p.N}), aligned16(p.residual, bytes, {p.residual_stride_m})};
}

inline void register_epilogue(prim::GlobalRanges& ranges, const Int8Epilogue& p) {
  ranges.read(p.x_scale, extent_bytes(DType::kFloat32, {{p.M, p.x_scale_stride}}));
  ranges.read(p.w_scale, tensor_bytes(DType::kFloat32, p.N));
  if (p.bias) ranges.read(p.bias, tensor_bytes(p.bias_dtype, p.N));
  if (p.residual) ranges.read(p.residual, extent_bytes(p.residual_dtype, {{p.M, p.residual_stride_m}, {p.N, 1}}));
  ranges.write_once(p.out, tensor_bytes(p.out_dtype, p.M * p.N));
}

// Calls f with a value of the output's element type.
template <class F>
cudaError_t dispatch_output(DType type, const F& f) {
  if (type == DType::kInt32) return f(int32_t{});
  if (type == DType::kInt8) return f(int8_t{});
  return dispatch_dtype<AllTypes>(type, f);
}

EFFVIT_DEVICE float activate(Activation activation, float y) {
  switch (activation) {
    case Activation::kRelu:
      return math::max(0.f, y);
    case Activation::kGelu:
      return y * math::normal_cdf_near(y);
    case Activation::kSilu:
      return y / (1.f + prim::exp(-y));
    default:
      return y;
  }
}

template <class Out>
EFFVIT_DEVICE Out rounded(float y) {
  if constexpr (std::is_same<Out, int8_t>::value) {
    return static_cast<int8_t>(prim::round_to_int(math::min(127.f, math::max(-128.f, y))));
  } else {
    return prim::from_float<Out>(y);
  }
}

// The first n of four neighbouring elements, then zeros. vec: all four exist and are aligned.
template <class T>
EFFVIT_DEVICE void load_four(const T* from, int n, bool vec, float (&y)[4]) {
  Vec<T, 4> x = {};
  if (vec) {
    x = prim::load_global_vec<Vec<T, 4>>(from);
  } else {
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (e < n) x.v[e] = prim::load_global(from + e);
    }
  }
  EFFVIT_UNROLL
  for (int e = 0; e < 4; ++e) y[e] = prim::to_float(x.v[e]);
}
EFFVIT_DEVICE void load_four(const void* from, DType type, int64_t at, int n, bool vec, float (&y)[4]) {
  if (type == DType::kFloat32) {
    load_four(static_cast<const float*>(from) + at, n, vec, y);
  } else if (type == DType::kBFloat16) {
    load_four(static_cast<const prim::bfloat16*>(from) + at, n, vec, y);
  } else {
    load_four(static_cast<const prim::float16*>(from) + at, n, vec, y);
  }
}

// Writes the tile whose sums are at sums.load_vec<V>(row, col). A barrier must come between their writers and this.
template <class Out, int kThreads, int kCols, class Sums>
EFFVIT_DEVICE void finish_tile(const Int8Epilogue& p, const EpilogueAccess& vec, const Sums& sums, const Place& at) {
  constexpr int kPieces = kCols / kVec<Out>, kRowStep = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0, "a thread's pieces are in the same columns");
  constexpr bool kRaw = std::is_same<Out, int32_t>::value;
  const int col = prim::thread_id() % kPieces * kVec<Out>, n = min_of(kVec<Out>, at.cols - col);
  if (n <= 0) return;
  float scale[kVec<Out>], bias[kVec<Out>];
  EFFVIT_UNROLL
  for (int e = 0; e < kVec<Out>; ++e) {
    const bool exists = !kRaw && e < n;
    scale[e] = exists ? prim::load_global(p.w_scale + at.col + col + e) : 0.f;
    bias[e] = exists && p.bias ? load_small(p.bias, at.col + col + e, p.bias_dtype) : 0.f;
  }
  const float inverse = 1.f / p.out_scale;
  EFFVIT_NO_UNROLL
  for (int r = prim::thread_id() / kPieces; r < at.rows; r += kRowStep) {
    const int64_t row = at.row + r;
    const float x_scale = kRaw ? 0.f : prim::load_global(p.x_scale + row * p.x_scale_stride);
    Piece<Out> out;
    EFFVIT_UNROLL
    for (int i = 0; i < kVec<Out>; i += 4) {
      const auto acc = sums.template load_vec<Vec<int32_t, 4>>(r, col + i);
      float residual[4] = {};
      if (!kRaw && p.residual)
        load_four(p.residual, p.residual_dtype, row * p.residual_stride_m + at.col + col + i, n - i,
                  vec.residual && n - i >= 4, residual);
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) {
        if constexpr (kRaw) {
          out.v[i + e] = acc.v[e];
        } else {
          float y = math::fma(static_cast<float>(acc.v[e]), x_scale * scale[i + e], bias[i + e]);
          y = activate(p.activation, y + residual[e]);
          out.v[i + e] = rounded<Out>(std::is_same<Out, int8_t>::value ? y * inverse : y);
        }
      }
    }
    store_piece(static_cast<Out*>(p.out) + row * p.N + at.col + col, out, n, vec.out);
  }
}

}  // namespace int8_impl
}  // namespace cuda
}  // namespace effvit
