// The epilogue of integers: from exact sums in a small tile to rescaled integers in memory, in one pass.
//
// A rescaling is a product of 64 bits, of which the high half is enough, see rounded_up and rounded_even of
// isa/rescale.inl.h, from a shift of 33 on. A smaller one becomes 33 where the factor has bits to spare: z m / 2^c =
// (z 2^s) m / 2^(c + s). Ties need more zeros at the ends of z and m than most have: what the factors are bounded by
// tells, channel by channel, where there can be none. So a panel of columns is done in one of three ways.
#pragma once

#include "int8_gemm.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace int8_impl {

// One rescaling of every column of a tile.
struct Rescaling {
  alignas(64) int32_t m[kMostColumns], c[kMostColumns];  // as they are given
  alignas(64) int32_t odd_m[kMostColumns];  // of the odd lanes, in the even ones
  alignas(64) int32_t left[kMostColumns], round[kMostColumns], right[kMostColumns];
  bool ties, shifts, exact;  // there may be ties; some `left` is not 0; some c is too small for the high half alone

  void take(const int32_t* multiplier, const int32_t* shift, int n) {
    std::memcpy(m, multiplier, static_cast<size_t>(n) * sizeof(int32_t));
    std::memcpy(c, shift, static_cast<size_t>(n) * sizeof(int32_t));
    for (int i = n; i % kLanes != 0; ++i) m[i] = 1, c[i] = 33;
  }
  // Of factors below 2^(bits + 1).
  void prepare(int n, int bits) {
    vi tie{}, small{}, any_left{};
    for (int i = 0; i < n; i += kLanes) {
      const vi by = load(c + i), factor = load(m + i);
      const vi s = most(33 - by, vi{});
      small |= s > 30 - bits;
      any_left |= s;
      // A tie: z m ends in c - 1 zeros, at most `bits` of which are z's.
      const vi zeros = least(most(by - 1 - bits, vi{}), set1(31));
      tie |= (factor & (vi)(((vu)set1(1) << (vu)zeros) - 1u)) == 0;
      const vi wide = most(by, set1(33));
      store(odd_m + i, odd_lanes(factor));
      store(left + i, least(s, set1(31)));
      store(round + i, set1(1) << (wide - 33));
      store(right + i, wide - 32);
    }
    ties = any(tie != 0), shifts = any(any_left != 0), exact = any(small != 0);
  }
};

// What the epilogue needs of the columns of a tile.
struct IntColumns {
  int64_t first = 0;
  int count = 0;
  bool saturates, exact, ties;  // sum plus bias may exceed int32; how panels are done: see above
  alignas(64) int32_t bias[kMostColumns];
  Rescaling acc, residual;

  void set(const IntEpilogue& p, int64_t column, int n) {
    first = column, count = n;
    int64_t largest = 0;
    if (p.bias) {
      std::memcpy(bias, p.bias + column, static_cast<size_t>(n) * sizeof(int32_t));
      for (int i = n; i % kLanes != 0; ++i) bias[i] = 0;
      vu high{};
      for (int i = 0; i < n; i += kLanes) {
        const vi x = load(bias + i);
        const vu size = (vu)((x ^ (x >> 31)) - (x >> 31));
        high = size > high ? size : high;
      }
      for (int k = 0; k < kLanes; ++k) largest = std::max<int64_t>(largest, high[k]);
    } else {
      for (int i = 0; i < n; i += kLanes) store(bias + i, vi{});
    }
    largest += p.largest_sum;
    saturates = largest > INT32_MAX;
    if (!p.multiplier) return;
    acc.take(p.multiplier + column, p.shift + column, n);
    acc.prepare(n, saturates ? 31 : bits_of(largest));
    exact = saturates | acc.exact, ties = acc.ties | (element_bytes(p.out_dtype) == 1 && acc.shifts);
    if (!p.residual) return;
    residual.take(p.residual_multiplier + column, p.residual_shift + column, n);
    residual.prepare(n, p.residual_dtype == DType::kInt32 ? kWideBits : p.residual_dtype == DType::kInt16 ? 15 : 7);
    exact |= residual.exact, ties |= residual.ties;
  }

  // Residuals of int32 are taken for as small as this, and rows with others are done again.
  static constexpr int kWideBits = 23;

 private:
  static int bits_of(int64_t x) { return 63 - __builtin_clzll(static_cast<uint64_t>(x) | 1); }
};

template <class T>
EFFVIT_INLINE vi load_first_integers(const void* p, int64_t at, int n) {
  const T* const from = static_cast<const T*>(p) + at;
  if (n >= kLanes) return load_integers(from);
  alignas(64) T some[kLanes] = {};
  std::memcpy(some, from, static_cast<size_t>(n) * sizeof(T));
  return load_integers(some);
}
EFFVIT_INLINE vi load_residual(const IntEpilogue& p, int64_t at, int n) {
  switch (p.residual_dtype) {
    case DType::kInt32:
      return load_first_integers<int32_t>(p.residual, at, n);
    case DType::kInt16:
      return load_first_integers<int16_t>(p.residual, at, n);
    case DType::kInt8:
      return load_first_integers<int8_t>(p.residual, at, n);
    default:
      return load_first_integers<uint8_t>(p.residual, at, n);
  }
}

EFFVIT_INLINE vi saturating_sum(vi a, vi b) {
  const vi sum = (vi)((vu)a + (vu)b), end = (a >> 31) ^ 0x7fffffff;
  return ((a ^ sum) & (b ^ sum)) < 0 ? end : sum;  // it has the sign of neither
}

// Where rows of a tile go, and the ends of what they may be.
template <class T>
struct Target {
  vi low, high;
  T* to;
  int64_t ld;

  Target(const IntEpilogue& p, int64_t row, const IntColumns& c)
      : low(set1(p.low)), high(set1(p.high)), to(static_cast<T*>(p.out) + row * p.N + c.first), ld(p.N) {}
  EFFVIT_INLINE void put(int r, int i, int n, vi y) const {
    store_first(to + r * ld + i, least(most(y, low), high), n);
  }
};

// Calls at(i, n) for every vector of n columns from i on.
template <class F>
EFFVIT_INLINE void for_vectors(int count, const F& at) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) at(i, kLanes);
  if (i < count) at(i, count - i);
}

// In 64 bits, whatever the numbers are.
template <class T>
void finish_exactly(const IntEpilogue& given, const int32_t* acc, int ld, const int32_t* sums, int64_t row, int rows,
                    const IntColumns& c) {
  const IntEpilogue p = given;  // a copy: stores may alias anything
  const Target<T> target(p, row, c);
  for_vectors(c.count, [&](int i, int n) __attribute__((always_inline)) {
    const vi bias = load(c.bias + i), m = load(c.acc.m + i), by = load(c.acc.c + i);
    const vi m2 = load(c.residual.m + i), by2 = load(c.residual.c + i);
    int64_t at = row * p.residual_stride_m + c.first + i;
    for (int r = 0; r < rows; ++r, at += p.residual_stride_m) {
      vi y = saturating_sum((vi)((vu)load(acc + r * ld + i) - (vu)set1(sums[r])), bias);
      if (p.residual)
        y = rescale_sum(y, m, by, load_residual(p, at, n), m2, by2, p.low, p.high);
      else if (p.multiplier)
        y = rescale(y, m, by, p.low, p.high);
      target.put(r, i, n, y);
    }
  });
}

struct AnyResidual {};  // of the dtype that the params say

// By the high halves of products. Residual: its element type, AnyResidual or void, for none. kTies: there may be; where
// not, sums that become int8 are not shifted either.
template <class T, class Residual, bool kTies>
void finish_fast(const IntEpilogue& given, const int32_t* acc, int ld, const int32_t* sums, int64_t row, int rows,
                 const IntColumns& c) {
  const IntEpilogue p = given;
  constexpr bool kResidual = !std::is_void_v<Residual>, kAny = std::is_same_v<Residual, AnyResidual>;
  constexpr bool kShift = kTies || !std::is_same_v<T, int8_t>;
  constexpr bool kMayBeWide = kAny || std::is_same_v<Residual, int32_t>;
  constexpr int32_t kWide = 1 << IntColumns::kWideBits;
  const Target<T> target(p, row, c);
  const auto rescaled = [](vi z, vi m, vi odd_m, vi round, vi right) __attribute__((always_inline)) {
    const vl even = mul_even(z, m), odd = mul_even(odd_lanes(z), odd_m);
    const vi top = high_halves(even, odd);
    if constexpr (kTies)
      return rounded_even(top, interleave((vul)even, (vul)odd), round, right);
    else
      return rounded_up(top, round, right);
  };
  vi wide{};
  for_vectors(c.count, [&](int i, int n) __attribute__((always_inline)) {
    const Rescaling &a = c.acc, &b = kResidual ? c.residual : c.acc;
    const vi m = load(a.m + i), odd_m = load(a.odd_m + i), left = load(a.left + i), round = load(a.round + i),
             right = load(a.right + i), bias = load(c.bias + i);
    const vi m2 = load(b.m + i), odd_m2 = load(b.odd_m + i), left2 = load(b.left + i), round2 = load(b.round + i),
             right2 = load(b.right + i);
    int64_t at = row * p.residual_stride_m + c.first + i;
    for (int r = 0; r < rows; ++r, at += p.residual_stride_m) {
      vi t = (vi)(((vu)load(acc + r * ld + i) - (vu)set1(sums[r])) + (vu)bias);
      if constexpr (kShift) t = t << left;
      vi y = rescaled(t, m, odd_m, round, right);
      if constexpr (kResidual) {
        vi z;
        if constexpr (kAny)
          z = load_residual(p, at, n);
        else
          z = load_first_integers<Residual>(p.residual, at, n);
        if constexpr (kMayBeWide) wide |= (vi)((vu)z + (vu)set1(kWide));
        y += rescaled((vi)((vu)z << (vu)left2), m2, odd_m2, round2, right2);
      }
      target.put(r, i, n, y);
    }
  });
  if (kMayBeWide && p.residual_dtype == DType::kInt32 && any((wide & ~(2 * kWide - 1)) != 0))
    finish_exactly<T>(p, acc, ld, sums, row, rows, c);
}

template <class T>
void finish_sums(const IntEpilogue& given, const int32_t* acc, int ld, const int32_t* sums, int64_t row, int rows,
                 const IntColumns& c) {
  const IntEpilogue p = given;
  const Target<T> target(p, row, c);
  for_vectors(c.count, [&](int i, int n) __attribute__((always_inline)) {
    const vi bias = load(c.bias + i);
    for (int r = 0; r < rows; ++r)
      target.put(r, i, n, (vi)(((vu)load(acc + r * ld + i) - (vu)set1(sums[r])) + (vu)bias));
  });
}

template <class T, class Residual>
EFFVIT_INLINE auto finish_by(const IntColumns& c) {
  constexpr bool kResidual = !std::is_void_v<Residual>;
  return c.ties ? finish_fast<T, std::conditional_t<kResidual, AnyResidual, void>, true>
                : finish_fast<T, Residual, false>;
}

// Rows [row, row + rows) of the result from acc[rows][ld], of which `sums` is still to be taken: see int8_gemm.inl.h.
template <class T>
void finish_integers(const IntEpilogue& p, const int32_t* acc, int ld, const int32_t* sums, int64_t row, int rows,
                     const IntColumns& c) {
  const auto how = [&] {
    if (!p.multiplier) return c.saturates ? finish_exactly<T> : finish_sums<T>;
    if (c.exact) return finish_exactly<T>;
    if (!p.residual) return finish_by<T, void>(c);
    switch (p.residual_dtype) {
      case DType::kInt32:
        return finish_by<T, int32_t>(c);
      case DType::kInt16:
        return finish_by<T, int16_t>(c);
      case DType::kInt8:
        return finish_by<T, int8_t>(c);
      default:
        return finish_by<T, uint8_t>(c);
    }
  }();
  how(p, acc, ld, sums, row, rows, c);
}

using FinishIntegers = void (*)(const IntEpilogue&, const int32_t*, int, const int32_t*, int64_t, int,
                                const IntColumns&);

inline FinishIntegers finish_of(const IntEpilogue& p) {
  const int64_t bytes = element_bytes(p.out_dtype);
  // int8_t: the low bytes, with or without a sign
  return bytes == 4 ? finish_integers<int32_t> : bytes == 2 ? finish_integers<int16_t> : finish_integers<int8_t>;
}

template <>
struct EpilogueOf<IntLinearParams> {
  using Columns = IntColumns;
  static FinishIntegers choose(const IntLinearParams& p) { return finish_of(p); }
};

}  // namespace int8_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
