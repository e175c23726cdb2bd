// The epilogue of integers: from exact sums in shared memory to rescaled integers in global memory, in one pass. As in
// int8_epilogue.cuh a thread has neighbouring columns of one row, and keeps their constants while it walks down the
// rows.
#pragma once
#include "../common/int_linear_params.h"
#include "../rows/int_params.h"
#include "int8_epilogue.cuh"

namespace effvit {
namespace cuda {
namespace int_impl {

using namespace tile;

#define EFFVIT_FN EFFVIT_DEVICE
template <class V>
EFFVIT_DEVICE V splat(uint32_t x) {
  return static_cast<V>(x);
}
#include "../rows/int_math.h"
#undef EFFVIT_FN

// Columns of a thread: at most 16 bytes, and no more than have their constants in registers.
template <class Out>
constexpr int kColumns = sizeof(Out) == 4 ? 4 : 8;

// Which accesses are whole vectors: of kColumns results, of four residuals.
struct IntAccess {
  bool out, residual;
};

inline IntAccess int_access(const IntEpilogue& p) {
  const auto aligned = [](const void* base, int64_t stride, int64_t element, int64_t count) {
    const int64_t bytes = element * count;
    return reinterpret_cast<uintptr_t>(base) % static_cast<uintptr_t>(bytes) == 0 && stride * element % bytes == 0;
  };
  const int64_t out = element_bytes(p.out_dtype);
  return {aligned(p.out, p.N, out, out == 4 ? 4 : 8),
          aligned(p.residual, p.residual_stride_m, element_bytes(p.residual_dtype), 4)};
}

inline void register_epilogue(prim::GlobalRanges& ranges, const IntEpilogue& p) {
  for (const int32_t* v : {p.multiplier, p.shift, p.bias, p.residual_multiplier, p.residual_shift}) {
    if (v != nullptr) ranges.read(v, tensor_bytes(DType::kInt32, p.N));
  }
  if (p.residual) ranges.read(p.residual, extent_bytes(p.residual_dtype, {{p.M, p.residual_stride_m}, {p.N, 1}}));
  ranges.write_once(p.out, tensor_bytes(p.out_dtype, p.M * p.N));
}

// Calls f with a value of the output's element type; of bytes the low ones, with or without a sign.
template <class F>
cudaError_t dispatch_integers(DType type, const F& f) {
  const int64_t bytes = element_bytes(type);
  return bytes == 4 ? f(int32_t{}) : bytes == 2 ? f(int16_t{}) : f(int8_t{});
}

// The first n of four neighbouring elements, then zeros. vec: all four exist and are aligned.
template <class T>
EFFVIT_DEVICE void load_four(const T* from, int n, bool vec, int32_t (&z)[4]) {
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
  for (int e = 0; e < 4; ++e) z[e] = x.v[e];
}
EFFVIT_DEVICE void load_four(const void* from, DType type, int64_t at, int n, bool vec, int32_t (&z)[4]) {
  if (type == DType::kInt32) {
    load_four(static_cast<const int32_t*>(from) + at, n, vec, z);
  } else if (type == DType::kInt16) {
    load_four(static_cast<const int16_t*>(from) + at, n, vec, z);
  } else if (type == DType::kInt8) {
    load_four(static_cast<const int8_t*>(from) + at, n, vec, z);
  } else {
    load_four(static_cast<const uint8_t*>(from) + at, n, vec, z);
  }
}

// The first n of `from`, then zeros; all zeros without it.
template <int kCount>
EFFVIT_DEVICE void load_constants(const int32_t* from, int n, int32_t (&to)[kCount]) {
  EFFVIT_UNROLL
  for (int e = 0; e < kCount; ++e) to[e] = from != nullptr && e < n ? prim::load_global(from + e) : 0;
}
template <int kCount>
EFFVIT_DEVICE void load_shifts(const int32_t* from, int n, int32_t (&to)[kCount]) {
  load_constants(from, n, to);
  EFFVIT_UNROLL
  for (int e = 0; e < kCount; ++e) to[e] = least(most(to[e], 1), 61);  // a GPU's values are not checked
}

// Writes the tile whose sums are at sums.load_vec<V>(row, col). A barrier must come between their writers and this.
template <class Out, int kThreads, int kCols, bool kResidual, class Sums>
EFFVIT_DEVICE void finish_tile(const IntEpilogue& p, const IntAccess& vec, const Sums& sums,
                               const int8_impl::Place& at) {
  constexpr int kMine = kColumns<Out>, kPieces = kCols / kMine, kRowStep = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0, "a thread's pieces are in the same columns");
  const int col = prim::thread_id() % kPieces * kMine, n = min_of(kMine, at.cols - col);
  if (n <= 0) return;
  const int64_t first = at.col + col;
  const auto of = [&](const int32_t* v) { return v == nullptr ? v : v + first; };
  int32_t bias[kMine], m[kMine], c[kMine], m2[kMine], c2[kMine];
  load_constants(of(p.bias), n, bias);
  load_constants(of(p.multiplier), n, m), load_shifts(of(p.shift), n, c);
  if constexpr (kResidual) load_constants(of(p.residual_multiplier), n, m2), load_shifts(of(p.residual_shift), n, c2);
  const bool raw = p.multiplier == nullptr;
  EFFVIT_NO_UNROLL
  for (int r = prim::thread_id() / kPieces; r < at.rows; r += kRowStep) {
    const int64_t row = at.row + r;
    Vec<Out, kMine> out;
    EFFVIT_UNROLL
    for (int i = 0; i < kMine; i += 4) {
      const auto acc = sums.template load_vec<Vec<int32_t, 4>>(r, col + i);
      int32_t z[4] = {};
      if constexpr (kResidual)
        load_four(p.residual, p.residual_dtype, row * p.residual_stride_m + first + i, n - i,
                  vec.residual && n - i >= 4, z);
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int32_t t = saturating_sum(acc.v[e], bias[i + e]);
        int32_t y;
        if constexpr (kResidual)
          y = rescale_sum(t, m[i + e], c[i + e], z[e], m2[i + e], c2[i + e], p.low, p.high);
        else
          y = raw ? least(most(t, p.low), p.high) : rescale(t, m[i + e], c[i + e], p.low, p.high);
        out.v[i + e] = static_cast<Out>(y);
      }
    }
    Out* const to = static_cast<Out*>(p.out) + row * p.N + first;
    if (vec.out) {  // a row is whole vectors then
      prim::store_global_vec(to, out);
    } else {
      EFFVIT_UNROLL
      for (int e = 0; e < kMine; ++e) {
        if (e < n) prim::store_global(to + e, out.v[e]);
      }
    }
  }
}

}  // namespace int_impl
}  // namespace cuda
}  // namespace effvit
