// Row-wise operators on the CPU: the functor of rows/<op>.h on vectors, over rows of any strides.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace rows_impl {

#define EFFVIT_FN EFFVIT_INLINE
template <class V>
EFFVIT_INLINE V splat(float x) {
  return set1(x);
}
EFFVIT_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
#include "../rows/math.h"
#define EFFVIT_ROWS
#include EFFVIT_ROWS_HEADER
#undef EFFVIT_ROWS
#undef EFFVIT_FN

using Params = RowsParams<ops::EFFVIT_OP>;

constexpr int64_t kUnit = 1 << 14;  // elements of a unit of work, about
constexpr int64_t kPastCaches = 16 << 20;  // outputs of more bytes are written past them: nobody reads them there
constexpr int64_t kLine = 64;  // not where rows share lines: halves of a line, written past the caches, cost much more

// kLanes elements from `at` on, of which the first n exist.
template <class T>
EFFVIT_INLINE vf load_some(const T* at, int64_t n) {
  if (n >= kLanes) return load(at);
  alignas(64) T some[kLanes] = {};
  std::memcpy(some, at, static_cast<size_t>(n) * sizeof(T));
  return load(some);
}
template <class T>
EFFVIT_INLINE void store_some(T* at, vf x, int64_t n) {
  if (n >= kLanes) return store(at, x);
  alignas(64) T some[kLanes];
  store(some, x);
  std::memcpy(at, some, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
EFFVIT_INLINE bool aligned_to_vectors(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(T)) == 0;
}

// Columns [begin, end) of one row.
template <class F, class T>
void row(const Params& p, int64_t index, int64_t begin, int64_t end, bool past_caches) {
  const T* in[F::kInputs];
  T* out[F::kOutputs];
  for (int i = 0; i < F::kInputs; ++i) in[i] = static_cast<const T*>(p.data[i]) + row_offset(p, i, index);
  for (int i = 0; i < F::kOutputs; ++i)
    out[i] = static_cast<T*>(p.data[F::kInputs + i]) + row_offset(p, F::kInputs + i, index);
  const auto at = [&](int64_t c, int64_t n, const auto& write) __attribute__((always_inline)) {
    vf x[F::kInputs], y[F::kOutputs];
    for (int i = 0; i < F::kInputs; ++i) x[i] = load_some(in[i] + c, n);
    F::apply(x, y);
    for (int i = 0; i < F::kOutputs; ++i) write(out[i] + c, y[i], n);
  };
  const auto plain = [](T* to, vf y, int64_t n) __attribute__((always_inline)) { store_some(to, y, n); };
  int64_t c = begin;
  if constexpr (!std::is_same_v<T, Float16>) {
    bool together = past_caches;  // all outputs can be aligned at once
    for (int i = 0; i < F::kOutputs; ++i)
      together = together && (out[i] - out[0]) % kLanes == 0 && reinterpret_cast<uintptr_t>(out[i]) % sizeof(T) == 0;
    if (together) {
      while (c < end && !aligned_to_vectors(out[0] + c)) at(c, 1, plain), ++c;
      const auto streamed = [](T* to, vf y, int64_t) __attribute__((always_inline)) { stream(to, y); };
      for (; c + kLanes <= end; c += kLanes) at(c, kLanes, streamed);
    }
  }
  for (; c + kLanes <= end; c += kLanes) at(c, kLanes, plain);
  if (c == end) return;
  if (end - begin >= kLanes) {
    at(end - kLanes, kLanes, plain);  // some elements once more: results never overlap inputs
  } else {
    at(c, end - c, plain);
  }
}

// Units: columns of one row where there is one, else rows.
int64_t unit_of(const Params& p) {
  return p.rows == 1 ? kUnit : std::max<int64_t>(1, kUnit / std::max<int64_t>(1, p.columns));
}
int64_t units(const Params& p) {
  const int64_t all = p.rows == 1 ? p.columns : p.rows, unit = unit_of(p);
  return (all + unit - 1) / unit;
}

template <template <int> class F>
void run(const Params& p, float*, int64_t begin, int64_t end) {
  const int64_t unit = unit_of(p), all = p.rows == 1 ? p.columns : p.rows;
  const int64_t first = begin * unit, last = std::min(end * unit, all);
  const int64_t row_bytes = p.columns * element_bytes(p.dtype);
  const bool past_caches = p.rows * row_bytes >= kPastCaches && (p.rows == 1 || row_bytes % kLine == 0);
  dispatch_dtype(p.dtype, [&](auto type) {
    dispatch_variant(p.variant, std::make_integer_sequence<int, kVariants>(), [&](auto variant) {
      using T = decltype(type);
      using Functor = F<decltype(variant)::value>;
      if (p.rows == 1) return row<Functor, T>(p, 0, first, last, past_caches);
      for (int64_t r = first; r < last; ++r) row<Functor, T>(p, r, 0, p.columns, past_caches);
    });
  });
  if (past_caches) stream_fence();
}

constexpr Step<Params> kForward[] = {{units, run<Forward>}};
constexpr Step<Params> kBackward[] = {{units, run<Backward>}};

}  // namespace rows_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<RowsParams<ops::EFFVIT_OP>>* EFFVIT_KERNEL_NAME(EFFVIT_OP)() {
  namespace impl = EFFVIT_ISA_NAME::rows_impl;
  static constexpr Kernel<RowsParams<ops::EFFVIT_OP>> kernel = {routine(impl::kForward), routine(impl::kBackward)};
  return &kernel;
}
}  // namespace effvit::cpu
