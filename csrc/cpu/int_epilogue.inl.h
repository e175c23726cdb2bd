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
    exact = saturates | acc.exact, ties = acc.ties | acc.shifts;
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

// Calls value(i, n, r, at), of n columns from i of row r, whose residual is at `at`, and stores what it returns between
// low and high.
template <class T, class Value>
EFFVIT_INLINE void store_rows(const IntEpilogue& p, int64_t row, int rows, const IntColumns& c, const Value& value) {
  const vi low = set1(p.low), high = set1(p.high);
  const int count = c.count;
  const int64_t N = p.N, stride = p.residual_stride_m, residual = row * stride + c.first;
  T* const to = static_cast<T*>(p.out) + row * N + c.first;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const auto column = value(i, kLanes);
    for (int r = 0; r < rows; ++r) store(to + r * N + i, least(most(column(r, residual + r * stride + i), low), high));
  }
  if (i == count) return;
  const int n = count - i;
  const auto column = value(i, n);
  for (int r = 0; r < rows; ++r)
    store_first(to + r * N + i, least(most(column(r, residual + r * stride + i), low), high), n);
}

// In 64 bits, whatever the numbers are.
template <class T>
void finish_exactly(const IntEpilogue& given, const int32_t* acc, int ld, const int32_t* sums, int64_t row, int rows,
                    const IntColumns& c) {
  const IntEpilogue p = given;  // a copy: stores may alias anything
  store_rows<T>(p, row, rows, c, [&](int i, int n) __attribute__((always_inline)) {
    return [&, i, n](int r, int64_t at) __attribute__((always_inline)) {
      const vi sum = (vi)((vu)load(acc + r * ld + i) - (vu)set1(sums[r]));
      const vi t = saturating_sum(sum, load(c.bias + i));
      if (!p.multiplier) return t;
      const vi m = load(c.acc.m + i), by = load(c.acc.c + i);
      if (!p.residual) return rescale(t, m, by, p.low, p.high);
      return rescale_sum(t, m, by, load_residual(p, at, n), load(c.residual.m + i), load(c.residual.c + i), p.low,
                         p.high);
    };
  });
}

// By the high halves of products. kTies: of both, and shifts of the sum; without them there are none.
template <class T, bool kResidual, bool kTies>
void finish_fast(const IntEpilogue& given, const int32_t* acc, int ld, const int32_t* sums, int64_t row, int rows,
                 const IntColumns& c) {
  const IntEpilogue p = given;
  const bool check_width = kResidual && p.residual_dtype == DType::kInt32;
  constexpr int32_t kWide = 1 << IntColumns::kWideBits;
  vi wide{};
  struct Constants {
    vi m, odd_m, left, round, right;
    explicit Constants(const Rescaling& x, int i)
        : m(load(x.m + i)),
          odd_m(load(x.odd_m + i)),
          left(load(x.left + i)),
          round(load(x.round + i)),
          right(load(x.right + i)) {}
  };
  const auto rescaled = [](const Constants& k, vi z) __attribute__((always_inline)) {
    const vl even = mul_even(z, k.m), odd = mul_even(odd_lanes(z), k.odd_m);
    const vi top = high_halves(even, odd);
    if constexpr (kTies) return rounded_even(top, interleave((vul)even, (vul)odd), k.round, k.right);
    return rounded_up(top, k.round, k.right);
  };
  store_rows<T>(p, row, rows, c, [&](int i, int n) __attribute__((always_inline)) {
    const Constants k(c.acc, i), of_residual(kResidual ? c.residual : c.acc, i);
    const vi bias = load(c.bias + i);
    return [&, i, n, k, of_residual, bias](int r, int64_t at) __attribute__((always_inline)) {
      vi t = (vi)(((vu)load(acc + r * ld + i) - (vu)set1(sums[r])) + (vu)bias);
      if constexpr (kTies) t = t << k.left;
      vi y = rescaled(k, t);
      if constexpr (kResidual) {
        const vi z = load_residual(p, at, n);
        wide |= (vi)((vu)z + (vu)set1(kWide));
        y += rescaled(of_residual, (vi)((vu)z << (vu)of_residual.left));
      }
      return y;
    };
  });
  if (check_width && any((wide & ~(2 * kWide - 1)) != 0)) finish_exactly<T>(p, acc, ld, sums, row, rows, c);
}

template <class T>
void finish_sums(const IntEpilogue& given, const int32_t* acc, int ld, const int32_t* sums, int64_t row, int rows,
                 const IntColumns& c) {
  const IntEpilogue p = given;
  store_rows<T>(p, row, rows, c, [&](int i, int) __attribute__((always_inline)) {
    const vi bias = load(c.bias + i);
    return [&, i, bias](int r, int64_t) __attribute__((always_inline)) {
      return (vi)(((vu)load(acc + r * ld + i) - (vu)set1(sums[r])) + (vu)bias);
    };
  });
}

// Rows [row, row + rows) of the result from acc[rows][ld], of which `sums` is still to be taken: see int8_gemm.inl.h.
template <class T>
void finish_integers(const IntEpilogue& p, const int32_t* acc, int ld, const int32_t* sums, int64_t row, int rows,
                     const IntColumns& c) {
  const auto how = !p.multiplier ? (c.saturates ? finish_exactly<T> : finish_sums<T>)
                   : c.exact     ? finish_exactly<T>
                   : p.residual  ? (c.ties ? finish_fast<T, true, true> : finish_fast<T, true, false>)
                                 : (c.ties ? finish_fast<T, false, true> : finish_fast<T, false, false>);
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
