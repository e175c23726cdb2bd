// Integer row-wise operators on the CPU: the functor of rows/<op>.h on vectors, pass by pass over a row of 32 bits that
// stays in the L1 cache; where there is one, by a shorter way of int_fast.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace rows_impl {

using EFFVIT_ISA_NAME::least;  // beside those of int_math.h
using EFFVIT_ISA_NAME::most;
using EFFVIT_ISA_NAME::mul_high;
using EFFVIT_ISA_NAME::product;
using EFFVIT_ISA_NAME::rescale;
using EFFVIT_ISA_NAME::rescale_sum;
using EFFVIT_ISA_NAME::rounded_shift;
using EFFVIT_ISA_NAME::select;

#define EFFVIT_FN EFFVIT_INLINE
// floor((2^31 - 1) / s), 1 <= s < 2^31. q from float32 is off by at most 2^-22 of itself and by 1, so what is left of
// the dividend is below 2^9 + s; its own quotient, rounded to 0, leaves an error of 1 either way.
EFFVIT_INLINE vu reciprocal(vu s) {
  const vi divisor = (vi)s, dividend = set1(0x7fffffff);
  const vf inverse = 1.f / __builtin_convertvector(divisor, vf);
  vi q = __builtin_convertvector(inverse * 2147483520.f, vi);
  q += __builtin_convertvector(__builtin_convertvector(dividend - q * divisor, vf) * inverse, vi);
  const vi left = dividend - q * divisor;
  return (vu)(q + (left >> 31) - (left >= divisor));
}
// floor(sqrt(v)), by float64: the next smaller root differs by more than its rounding. 0: not this way.
EFFVIT_INLINE uint64_t exact_root(uint64_t v) {
  return v >> 52 ? 0 : static_cast<uint64_t>(__builtin_sqrt(static_cast<double>(v)));
}

#include "../rows/int_math.h"
template <>
struct UnsignedOf<vi> {
  using type = vu;
};

// The first n elements, zeros beyond.
EFFVIT_INLINE vi load_first(const int32_t* p, int64_t n) {
  if (n >= kLanes) return load(p);
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n) - 1), p);
#elif defined(EFFVIT_HAS_AVX2)
  return (vi)_mm256_maskload_epi32(p, (__m256i)lanes_below(static_cast<int>(n)));
#else
  int32_t some[kLanes] = {};
  std::memcpy(some, p, static_cast<size_t>(n) * 4);
  return load(some);
#endif
}
template <class T>
EFFVIT_INLINE void store_first(T* p, vi x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  T some[kLanes];
  store(some, x);
  std::memcpy(p, some, static_cast<size_t>(n) * sizeof(T));
}

// Of all lanes, in 64 bits.
EFFVIT_INLINE int64_t sum_of(vi x) {
  const vl pairs = ((vl)x >> 32) + (((vl)x << 32) >> 32);
  int64_t total = 0;
  for (int k = 0; k < kLanes / 2; ++k) total += pairs[k];
  return total;
}
EFFVIT_INLINE uint64_t sum_of(vu x) {
  const vul pairs = ((vul)x >> 32) + ((vul)x & 0xffffffffu);
  uint64_t total = 0;
  for (int k = 0; k < kLanes / 2; ++k) total += pairs[k];
  return total;
}

#include "int_fast.inl.h"

EFFVIT_INLINE vi rescale_all(const IntRowsData& p, vi z, bool narrow) {
  if (narrow && p.scale != 0) {
    const vd s = vd{} + p.scale;
    const vi y = low_words(scaled(lower_half(z), s), scaled(upper_half(z), s));
    return least(most(y, set1(p.low)), set1(p.high));
  }
  return rescale(z, set1(p.multiplier), set1(p.shift), p.low, p.high);
}

#define EFFVIT_ROWS
#include EFFVIT_ROWS_HEADER
#undef EFFVIT_ROWS
#undef EFFVIT_FN

using Params = IntRowsParams<ops::EFFVIT_OP>;

constexpr int64_t kUnit = 1 << 14;  // elements of a unit of work, about
constexpr int64_t kFlush = 1 << 14;  // vectors whose halves can be added in 32 bits

// One row: where it is, what is kept of it.
struct Source {
  const int32_t *x, *residual, *const *vectors;
  int32_t* kept;  // [columns], up to whole vectors
  int64_t columns;
};

// The lanes that exist; the others `other`.
EFFVIT_INLINE vi only(vi x, int64_t n, int32_t other) {
  return n >= kLanes ? x : select(lanes_below(static_cast<int>(n)), x, set1(other));
}

// Of all lanes, by f of two vectors, in whatever order.
template <class F>
EFFVIT_INLINE int32_t fold(vi x, const F& f) {
#if EFFVIT_LANES == 16
  x = f(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = f(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = f(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  x = f(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif EFFVIT_LANES == 8
  x = f(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = f(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
  x = f(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
#else
  x = f(x, __builtin_shufflevector(x, x, 2, 3, 0, 1));
  x = f(x, __builtin_shufflevector(x, x, 1, 0, 3, 2));
#endif
  return x[0];
}
// Reduces the terms of one pass; the smallest one as well for kRange.
template <class F, int kPass, class Row>
EFFVIT_INLINE void reduce(const IntRowsData& p, const Source& s, Row& row) {
  constexpr bool kKeep = F::kKeeps && kPass == F::kPasses - 1;
  const int64_t columns = s.columns;
  const int32_t* const x = s.x;
  int32_t* const kept = s.kept;
  const Row state = row;  // stores may alias anything
  const auto term = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vi y = F::template term<kPass>(p, state, load_first(x + i, n));
    if constexpr (kKeep) store(kept + i, y);
    return y;
  };
  constexpr Reduce kReduction = F::kReductions[kPass];
  if constexpr (kReduction == Reduce::kMax || kReduction == Reduce::kRange) {
    vi high = set1(INT32_MIN), low = set1(INT32_MAX);
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) {
      const vi y = term(i, kLanes);
      high = most(high, y), low = least(low, y);
    }
    if (i < columns) {
      const vi y = term(i, columns - i);
      high = most(high, only(y, columns - i, INT32_MIN)), low = least(low, only(y, columns - i, INT32_MAX));
    }
    const auto larger = [](vi a, vi b) __attribute__((always_inline)) { return most(a, b); };
    const auto smaller = [](vi a, vi b) __attribute__((always_inline)) { return least(a, b); };
    const int32_t bottom = kReduction == Reduce::kRange ? fold(low, smaller) : 0;
    F::template finish<kPass>(p, row, fold(high, larger), bottom);
  } else if constexpr (kReduction == Reduce::kSaturating) {
    const vu limit = (vu)set1(INT32_MAX);
    vu sum{};
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) sum = least(sum + (vu)term(i, kLanes), limit);
    if (i < columns) sum = least(sum + (vu)only(term(i, columns - i), columns - i, 0), limit);
    const auto add = [&](vi a, vi b) __attribute__((always_inline)) { return (vi)least((vu)a + (vu)b, limit); };
    F::template finish<kPass>(p, row, fold((vi)sum, add), 0);
  } else {
    const auto number = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const vi y = only(term(i, n), n, 0);
      return kReduction == Reduce::kSquares ? (vi)((vu)y * (vu)y) : y;
    };
    int64_t total = 0;
    for (int64_t first = 0; first < columns; first += kFlush * kLanes) {
      const int64_t last = std::min(columns, first + kFlush * kLanes);
      vi high{};  // of the high halves
      vu all{};  // wraps: less the high halves it is the sum of the low ones, below 2^32
      int64_t i = first;
      for (; i + kLanes <= last; i += kLanes) {
        const vi y = number(i, kLanes);
        high += y >> 16, all += (vu)y;
      }
      if (i < last) {
        const vi y = number(i, last - i);
        high += y >> 16, all += (vu)y;
      }
      total += sum_of(high) * 65536 + static_cast<int64_t>(sum_of(all - ((vu)high << 16)));
    }
    F::template finish<kPass>(p, row, total, 0);
  }
}

template <class F, int kPass, class Row>
EFFVIT_INLINE void reduce_from(const IntRowsData& p, const Source& s, Row& row) {
  if constexpr (kPass < F::kPasses) {
    reduce<F, kPass>(p, s, row);
    reduce_from<F, kPass + 1>(p, s, row);
  }
}

template <class F, class T, class Row>
EFFVIT_INLINE void map(const IntRowsData& p, const Source& s, const Row& row, T* out) {
  const int64_t columns = s.columns;
  const Source t = s;
  const Row state = row;
  const auto at = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    vi v[F::kVectors + 1] = {};
    for (int k = 0; k < F::kVectors; ++k) {
      if (t.vectors[k]) v[k] = load_first(t.vectors[k] + i, n);
    }
    vi kept{};
    if constexpr (F::kKeeps) kept = load(t.kept + i);
    const vi residual = t.residual ? load_first(t.residual + i, n) : vi{};
    store_first(out + i, F::map(p, state, load_first(t.x + i, n), kept, residual, v), n);
  };
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) at(i, kLanes);
  if (i == columns) return;
  if (columns >= kLanes) {
    at(columns - kLanes, kLanes);  // some elements once more: results never overlap inputs
  } else {
    at(i, columns - i);
  }
}

// Results by how far x is below the row's largest one, kTable - 1 - (top - x): computed once for all rows with that.
constexpr int kTable = 256, kTables = 256;
template <class T>
struct Table {
  alignas(64) T at[kTable];
  int32_t top, filled;
};

template <class T>
EFFVIT_INLINE void look_up(const Table<T>& table, const int32_t* x, int64_t columns, int64_t shift, T* out) {
  const T* const at = table.at;
  int64_t i = 0;
#if defined(EFFVIT_HAS_AVX512)
  if constexpr (sizeof(T) == 1) {
    const TableOfBytes of(at);
    const __m512i offset = _mm512_set1_epi32(static_cast<int32_t>(shift));
    const auto index = [&](int64_t k) __attribute__((always_inline)) {
      return _mm512_cvtepi32_epi16(_mm512_add_epi32(_mm512_loadu_si512(x + k), offset));
    };
    for (; i + 32 <= columns; i += 32) {
      const __m512i k = _mm512_inserti64x4(_mm512_castsi256_si512(index(i)), index(i + 16), 1);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), of(k));
    }
  }
#endif
  for (; i < columns; ++i) out[i] = at[x[i] + shift];
}

template <class F, class T, class Row>
EFFVIT_INLINE const Table<T>& table_of(const IntRowsData& p, const Row& row, Table<T>* tables) {
  Row any_x = row;  // the last vector goes beyond the row's smallest x
  any_x.fits = any_x.narrow = false;
  Table<T>& table = tables[static_cast<uint32_t>(row.top) % kTables];
  const int32_t top = row.top, range = top - row.bottom;
  if (table.top != top) table.top = top, table.filled = 0;
  for (; table.filled <= range; table.filled += kLanes) {  // whole vectors, from the top down
    vi x;
    for (int k = 0; k < kLanes; ++k) {
      const int64_t y = int64_t{top} - table.filled - (kLanes - 1) + k;
      x[k] = static_cast<int32_t>(std::max<int64_t>(y, INT32_MIN));
    }
    const vi none[F::kVectors + 1] = {};
    store(table.at + (kTable - kLanes - table.filled), F::map(p, any_x, x, vi{}, vi{}, none));
  }
  return table;
}

int64_t rows_of_unit(const Params& p) { return std::max<int64_t>(1, kUnit / std::max<int64_t>(1, p.columns)); }
int64_t units(const Params& p) { return ceil_div(p.rows, rows_of_unit(p)); }

// What rows need, and what follows from a call's scales: made once for all of them.
template <class F, class T>
struct Rows {
  static constexpr bool kScaled = F::kPasses == 0 || F::kAdds;  // x, and the residual where there is one
  static constexpr bool kNorm = F::kIsNorm && sizeof(T) == 1;

  const Params& given;
  IntRowsData p;
  Source s{};
  int32_t *x = nullptr, *residual = nullptr;
  double *x_scales = nullptr, *residual_scales = nullptr;
  NormTable norm{};
  int16_t* narrowed = nullptr;
  Table<T>* tables = nullptr;
  bool exact = false;  // float64 will do for kScaled

  Rows(const Params& given) : given(given), p(given) {
    F::prepare(p);
    Scratch count;
    lay_out(count);
    Scratch scratch(static_cast<char*>(thread_scratch(static_cast<size_t>(count.used()))));
    lay_out(scratch);
    if constexpr (F::kTabulates) {
      for (int i = 0; i < kTables; ++i) tables[i].top = 0, tables[i].filled = 0;
      p.scale = scale_of(p.multiplier, p.shift);
      if (p.scale * double(1 << kExactBits) >= 0x1p31) p.scale = 0;
    }
    if constexpr (kScaled) {
      const int32_t* const* const v = p.vectors + F::kScales;
      double largest = scales_of(v[0], v[1], p.columns, x_scales) * most_of(p.x_dtype);
      if (v[2]) largest += scales_of(v[2], v[3], p.columns, residual_scales) * most_of(p.residual_dtype);
      exact = largest < 0x1p30;
    }
    if constexpr (kNorm) {
      if (norm.s && p.flags[2]) fill(norm, p);
    }
    s.columns = p.columns, s.vectors = given.vectors;
  }

  void lay_out(Scratch& scratch) {
    const int64_t whole = p.columns + kLanes;
    s.kept = scratch.take<int32_t>(F::kKeeps ? whole : 0);
    x = scratch.take<int32_t>(p.x_dtype == DType::kInt32 && !F::kAdds ? 0 : whole);
    residual = scratch.take<int32_t>(p.residual && p.residual_dtype != DType::kInt32 ? whole : 0);
    x_scales = scratch.take<double>(kScaled ? whole : 0);
    residual_scales = scratch.take<double>(kScaled ? whole : 0);
    tables = scratch.take<Table<T>>(F::kTabulates ? kTables : 0);
    if (kNorm && p.variant != 0 && p.columns >= 4 * kLanes && p.columns <= kLongest) {
      norm.s = scratch.take<float>(p.columns), norm.b = scratch.take<float>(p.columns);
      narrowed = scratch.take<int16_t>(p.columns);
    }
  }

  // x and the residual in steps of the result, or of a sum: exactly, in whatever arithmetic.
  template <class To>
  EFFVIT_INLINE void scale(const IntRowsData& p, const int32_t* x, const int32_t* residual, int32_t low, int32_t high,
                           To* to) {
    const int64_t n = p.columns;
    if (exact && (residual ? scale_row<true>(x, x_scales, residual, residual_scales, n, low, high, to)
                           : scale_row<false>(x, x_scales, residual, residual_scales, n, low, high, to))) {
      return;
    }
    const int32_t* const* const v = p.vectors + F::kScales;
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, n - i);
      const vi z = load_first(x + i, count), m = load_first(v[0] + i, count), c = shift_of(load_first(v[1] + i, count));
      vi y;
      if (residual) {
        const vi m2 = load_first(v[2] + i, count), c2 = shift_of(load_first(v[3] + i, count));
        y = rescale_sum(z, m, c, load_first(residual + i, count), m2, c2, low, high);
      } else {
        y = rescale(z, m, c, low, high);
      }
      store_first(to + i, y, count);
    }
  }

  // Where it can be done from x of fewer bits than 32, or by float32.
  EFFVIT_INLINE bool short_cut(const IntRowsData& p, int64_t start, int64_t r, T* out) {
    using Row = typename F::Row;
    if constexpr (F::kTabulates) {
      if (element_bytes(p.x_dtype) != 1) return false;
      const uint8_t* const bytes = static_cast<const uint8_t*>(p.x) + start;
      const uint8_t flip = p.x_dtype == DType::kInt8 ? 128 : 0;
      uint8_t largest, smallest;
      range_of(bytes, p.columns, flip, largest, smallest);
      Row row{};
      F::template finish<0>(p, row, largest - flip, smallest - flip);
      if (static_cast<uint32_t>(row.top) - static_cast<uint32_t>(row.bottom) >= kTable) return false;
      look_up_bytes(table_of<F>(p, row, tables).at, bytes, p.columns, static_cast<uint8_t>(255 - row.top), out);
      return true;
    }
    if constexpr (kNorm) {
      if (norm.limit == 0) return false;
      RowOf16 source{};
      source.x = narrowed;
      if (F::kAdds) {
        source.x = p.sum + r * p.columns;
      } else if (p.x_dtype == DType::kInt16) {
        source.x = static_cast<const int16_t*>(p.x) + start;
      } else if (p.x_dtype == DType::kInt32) {
        if (!narrow(static_cast<const int32_t*>(p.x) + start, p.columns, narrowed)) return false;
      } else if (p.x_dtype == DType::kInt8) {
        widen_to_16(static_cast<const int8_t*>(p.x) + start, p.columns, narrowed);
      } else {
        widen_to_16(static_cast<const uint8_t*>(p.x) + start, p.columns, narrowed);
      }
      return norm_row<F, T, Row>(p, norm, source, out);
    }
    return false;
  }

  EFFVIT_INLINE void row(const IntRowsData& p, int64_t r) {
    const int64_t start = row_start(given, given.x_stride, r), n = p.columns;
    T* const out = static_cast<T*>(p.out) + r * n;
    if constexpr (kScaled) {
      s.x = in_32_bits(p.x, p.x_dtype, start, n, x);
      s.residual =
          p.residual ? in_32_bits(p.residual, p.residual_dtype, row_start(given, given.residual_stride, r), n, residual)
                     : nullptr;
      if constexpr (!F::kAdds) return scale(p, s.x, s.residual, p.low, p.high, out);
      scale(p, s.x, s.residual, p.sum_low, p.sum_high, p.sum + r * n);
    }
    if (short_cut(p, start, r, out)) return;
    s.x = F::kAdds ? in_32_bits(p.sum, DType::kInt16, r * n, n, x) : in_32_bits(p.x, p.x_dtype, start, n, x);
    s.residual = nullptr;
    typename F::Row row{};
    reduce_from<F, 0>(p, s, row);
    if constexpr (F::kTabulates) {
      if (static_cast<uint32_t>(row.top) - static_cast<uint32_t>(row.bottom) < kTable) {
        const int64_t shift = int64_t{kTable - 1} - row.top;
        return look_up(table_of<F>(p, row, tables), s.x, n, shift, out);
      }
    }
    map<F, T>(p, s, row, out);
  }
};

template <class F, class T>
void rows(const Params& given, int64_t begin, int64_t end) {
  Rows<F, T> all(given);
  const IntRowsData p = all.p;  // a copy that no store can alias
  for (int64_t r = begin; r < end; ++r) all.row(p, r);
}

void run(const Params& p, float*, int64_t begin, int64_t end) {
  const int64_t unit = rows_of_unit(p), first = begin * unit, last = std::min(end * unit, p.rows);
  dispatch_variant(p.variant, std::make_integer_sequence<int, kVariants>(), [&](auto variant) {
    using F = Forward<decltype(variant)::value>;
    const int64_t bytes = element_bytes(p.out_dtype);
    if (bytes == 4) return rows<F, int32_t>(p, first, last);
    if (bytes == 2) return rows<F, int16_t>(p, first, last);
    rows<F, int8_t>(p, first, last);  // the low bytes, with or without a sign
  });
}

constexpr Step<Params> kForward[] = {{units, run}};

}  // namespace rows_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<IntRowsParams<ops::EFFVIT_OP>>* EFFVIT_KERNEL_NAME(EFFVIT_OP)() {
  namespace impl = EFFVIT_ISA_NAME::rows_impl;
  static constexpr Kernel<IntRowsParams<ops::EFFVIT_OP>> kernel = {routine(impl::kForward), {}};
  return &kernel;
}
}  // namespace effvit::cpu
