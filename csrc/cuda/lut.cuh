// Tables of levels on a GPU: codes by a binary search among thresholds in shared memory, and what codes are worth, for
// groups of four elements over rows of any strides.
#pragma once
#include "../common/lut_params.h"
#include "common.cuh"

namespace effvit {
namespace cuda {
namespace lut {

constexpr int kThreads = 256, kGroup = 4;

template <class T>
using Group = prim::Vec<T, kGroup>;

// How many of the thresholds are at most x, none for a NaN: from the highest bit of the count to the lowest.
EFFVIT_DEVICE int count(const prim::Shared<float>& thresholds, int n, int bits, float x) {
  int found = 0;
  EFFVIT_NO_UNROLL
  for (int step = 1 << (bits - 1); step > 0; step >>= 1) {
    const int probe = found + step;
    if (probe <= n && x >= thresholds.load(probe - 1)) found = probe;
  }
  return found;
}

// In: a floating-point type, or uint8_t where x are codes. Out: likewise, uint8_t where results are codes.
template <class In, class Out>
EFFVIT_KERNEL(kThreads, 4)
lut_kernel(LutParams p, int bits, int64_t groups, bool vec) {
  constexpr bool kSearches = !std::is_same<In, uint8_t>::value, kValues = !std::is_same<Out, uint8_t>::value;
  const prim::Shared<float> thresholds(0, LutParams::kMostCodes);
  const prim::Shared<float> values(LutParams::kMostCodes * 4, LutParams::kMostCodes);
  for (int i = prim::thread_id(); i < p.codes; i += kThreads) {
    if constexpr (kSearches) {
      if (i < p.codes - 1) thresholds.store(i, prim::load_global(p.thresholds + i));
    }
    if constexpr (kValues) values.store(i, prim::load_global(p.values + i));
  }
  prim::sync_threads();
  const int64_t per_row = ceil_div(p.columns, kGroup);
  const int64_t step = static_cast<int64_t>(prim::cta_count()) * kThreads;
  EFFVIT_NO_UNROLL
  for (int64_t i = static_cast<int64_t>(prim::cta_id()) * kThreads + prim::thread_id(); i < groups; i += step) {
    const int64_t row = i / per_row, column = (i - row * per_row) * kGroup;
    const int n = static_cast<int>(p.columns - column < kGroup ? p.columns - column : kGroup);
    const In* const from = static_cast<const In*>(p.x) + row_start(p, row) + column;
    Out* const to = static_cast<Out*>(p.out) + row * p.columns + column;
    Group<In> x;
    if (vec) {
      x = prim::load_global_vec<Group<In>>(from);
    } else {
      EFFVIT_UNROLL
      for (int e = 0; e < kGroup; ++e) x.v[e] = e < n ? prim::load_global(from + e) : In{};
    }
    Group<Out> y;
    EFFVIT_UNROLL
    for (int e = 0; e < kGroup; ++e) {
      int code;
      float given = 0.f;
      if constexpr (kSearches) {
        given = prim::to_float(x.v[e]);
        code = count(thresholds, p.codes - 1, bits, given);
      } else {
        code = x.v[e];
      }
      if constexpr (!kValues) {
        y.v[e] = static_cast<uint8_t>(p.descending ? p.codes - 1 - code : code);
      } else {
        float v = code < p.codes ? values.load(code) : prim::bit_cast<float>(0x7fc00000u);
        if constexpr (kSearches) v = given == given ? v : given;
        y.v[e] = prim::from_float<Out>(v);
      }
    }
    if (vec) {
      prim::store_global_vec(to, y);
    } else {
      EFFVIT_UNROLL
      for (int e = 0; e < kGroup; ++e) {
        if (e < n) prim::store_global(to + e, y.v[e]);
      }
    }
  }
}

template <class In, class Out>
cudaError_t launch(const LutParams& p, cudaStream_t stream) {
  int bits = 0;
  while ((p.codes - 1) >> bits) ++bits;
  const int64_t groups = p.rows * ceil_div(p.columns, kGroup);
  bool vec = p.columns % kGroup == 0 && reinterpret_cast<uintptr_t>(p.x) % sizeof(Group<In>) == 0 &&
             reinterpret_cast<uintptr_t>(p.out) % sizeof(Group<Out>) == 0;
  int64_t last = p.columns - 1;
  for (int k = 0; k < p.dims; ++k) {
    vec = vec && p.x_stride[k] % kGroup == 0;
    last += (p.size[k] - 1) * p.x_stride[k];
  }
  prim::GlobalRanges ranges;
  ranges.read(p.x, static_cast<uint64_t>(last + 1) * sizeof(In));
  if (p.thresholds != nullptr) ranges.read(p.thresholds, static_cast<uint64_t>(p.codes - 1) * 4);
  if (p.values != nullptr) ranges.read(p.values, static_cast<uint64_t>(p.codes) * 4);
  ranges.write_once(p.out, static_cast<uint64_t>(p.rows * p.columns) * sizeof(Out));
  const int64_t most = 8 * prim::target_ctas(), ctas = ceil_div(groups, kThreads);
  const cudaError_t error = EFFVIT_LAUNCH((lut_kernel<In, Out>), ctas < most ? ctas : most, kThreads,
                                          2 * LutParams::kMostCodes * 4, stream, p, bits, groups, vec);
  ranges.finish();
  return error;
}

}  // namespace lut
}  // namespace cuda
}  // namespace effvit
