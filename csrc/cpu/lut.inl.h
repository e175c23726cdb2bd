// Tables of levels on the CPU: codes by a search among sorted thresholds, and what codes are worth.
//
// The search is branchless, a comparison for each bit of a code. Thresholds lie in the order of a complete binary tree:
// node i has the children 2 i and 2 i + 1, so that a level is an array of its own, which a permutation of registers
// looks up where it is short, and a gather where it is long. Nodes without a threshold are NaN: no x reaches them.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace lut_impl {

constexpr int64_t kUnit = 1 << 14;  // elements of a unit of work, about
constexpr int kAhead = 4;  // vectors that are searched together: a step waits for the one before
constexpr int64_t kPastCaches = 16 << 20;  // results of more bytes are written past them

// The entry of every lane: the first n of `table`, n a power of two, readable up to whole vectors.
template <int n>
EFFVIT_INLINE vf look_up(const float* table, vi at) {
#if defined(EFFVIT_HAS_AVX512)
  if constexpr (n <= 16) return (vf)_mm512_permutexvar_ps((__m512i)at, (__m512)load(table));
  if constexpr (n == 32) return (vf)_mm512_permutex2var_ps((__m512)load(table), (__m512i)at, (__m512)load(table + 16));
  return (vf)_mm512_i32gather_ps((__m512i)at, table, 4);
#elif defined(EFFVIT_HAS_AVX2)
  if constexpr (n <= 8) return (vf)_mm256_permutevar8x32_ps((__m256)load(table), (__m256i)at);
  if constexpr (n == 16) {
    const __m256 low = _mm256_permutevar8x32_ps((__m256)load(table), (__m256i)at);
    const __m256 high = _mm256_permutevar8x32_ps((__m256)load(table + 8), (__m256i)at);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(at << 28));
  }
  return (vf)_mm256_i32gather_ps(table, (__m256i)at, 4);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = table[at[i]];
  return v;
#endif
}

struct Tables {
  alignas(64) float tree[LutParams::kMostCodes + 16];  // of thresholds, the root at 1
  alignas(64) float values[LutParams::kMostCodes + 16];

  // kBits: of a code.
  void fill(const LutParams& p, int bits) {
    if (p.thresholds) {
      for (int level = 0; level < bits; ++level) {
        for (int i = 0; i < 1 << level; ++i) {
          const int at = ((2 * i + 1) << (bits - 1 - level)) - 1;
          tree[(1 << level) + i] = at < p.codes - 1 ? p.thresholds[at] : __builtin_nanf("");
        }
      }
      for (int i = 1 << bits; i < LutParams::kMostCodes + 16; ++i) tree[i] = 0.f;
      tree[0] = 0.f;
    }
    if (p.values) {
      for (int i = 0; i < LutParams::kMostCodes + 16; ++i) values[i] = i < p.codes ? p.values[i] : __builtin_nanf("");
    }
  }
};

// How many thresholds are at most x: n vectors at once.
template <int kBits, int n>
EFFVIT_INLINE void search(const float* tree, const vf (&x)[n], vi (&code)[n]) {
  for (int i = 0; i < n; ++i) code[i] = -(vi)(x[i] >= set1(tree[1]));
  const auto level = [&](auto k) __attribute__((always_inline)) {
    constexpr int kLevel = decltype(k)::value;
    if constexpr (kLevel < kBits) {
      for (int i = 0; i < n; ++i) {
        const vf t = look_up<(1 << kLevel)>(tree + (1 << kLevel), code[i]);
        code[i] = code[i] + code[i] - (vi)(x[i] >= t);
      }
    }
  };
  level(std::integral_constant<int, 1>{}), level(std::integral_constant<int, 2>{});
  level(std::integral_constant<int, 3>{}), level(std::integral_constant<int, 4>{});
  level(std::integral_constant<int, 5>{}), level(std::integral_constant<int, 6>{});
  level(std::integral_constant<int, 7>{});
}

// Four vectors of codes as bytes.
EFFVIT_INLINE void store_codes(uint8_t* p, const vi (&code)[kAhead]) {
#if defined(EFFVIT_HAS_AVX2) && !defined(EFFVIT_HAS_AVX512)
  const __m256i low = _mm256_packus_epi32((__m256i)code[0], (__m256i)code[1]);
  const __m256i high = _mm256_packus_epi32((__m256i)code[2], (__m256i)code[3]);
  const __m256i bytes = _mm256_packus_epi16(low, high);  // words of four: 0 1 2 3 of every 128 bits
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
#else
  for (int i = 0; i < kAhead; ++i) store(reinterpret_cast<int8_t*>(p) + i * kLanes, code[i]);
#endif
}

// ---- what is done with vectors of x ----

template <int kBits>
struct Quantize {
  using Out = uint8_t;
  const float* tree;
  vi flip, codes;  // a code is (count ^ flip) + codes: the count, or the last code less it

  EFFVIT_INLINE Quantize(const Tables& t, const LutParams& p) : tree(t.tree) {
    flip = vi{} - (p.descending ? 1 : 0), codes = vi{} + (p.descending ? p.codes : 0);
  }
  template <int n>
  EFFVIT_INLINE void apply(const vf (&x)[n], vi (&y)[n]) const {
    search<kBits, n>(tree, x, y);
    for (int i = 0; i < n; ++i) y[i] = (y[i] ^ flip) + codes;
  }
};

template <int kBits>
struct FakeQuantize {
  const float *tree, *values;

  EFFVIT_INLINE FakeQuantize(const Tables& t, const LutParams&) : tree(t.tree), values(t.values) {}
  template <int n>
  EFFVIT_INLINE void apply(const vf (&x)[n], vf (&y)[n]) const {
    vi code[n];
    search<kBits, n>(tree, x, code);
    for (int i = 0; i < n; ++i) {
      const vf v = look_up<(1 << kBits)>(values, code[i]);
      y[i] = x[i] == x[i] ? v : x[i];
    }
  }
};

template <int kBits>
struct Dequantize {
  const float* values;

  EFFVIT_INLINE Dequantize(const Tables& t, const LutParams&) : values(t.values) {}
  template <int n>
  EFFVIT_INLINE void apply(const vi (&q)[n], vf (&y)[n]) const {
    for (int i = 0; i < n; ++i) {
      y[i] = look_up<(1 << kBits)>(values, kBits < 8 ? q[i] & ((1 << kBits) - 1) : q[i]);
      if constexpr (kBits < 8) y[i] = q[i] < (1 << kBits) ? y[i] : set1(__builtin_nanf(""));
    }
  }
};

EFFVIT_INLINE vf load_input(const float* p) { return load(p); }
EFFVIT_INLINE vf load_input(const BFloat16* p) { return load(p); }
EFFVIT_INLINE vf load_input(const Float16* p) { return load(p); }
EFFVIT_INLINE vi load_input(const uint8_t* p) { return load_integers(p); }
EFFVIT_INLINE void store_output(uint8_t* p, const vi (&y)[kAhead]) { store_codes(p, y); }
EFFVIT_INLINE void store_output(uint8_t* p, const vi (&y)[1]) { store(reinterpret_cast<int8_t*>(p), y[0]); }
template <class T, int n>
EFFVIT_INLINE void store_output(T* p, const vf (&y)[n]) {
  for (int i = 0; i < n; ++i) store(p + i * kLanes, y[i]);
}
template <class T, int n>
EFFVIT_INLINE void stream_output(T* p, const vf (&y)[n]) {
  for (int i = 0; i < n; ++i) stream(p + i * kLanes, y[i]);
}

// Columns [begin, end) of one row.
template <class In, class Out, class F>
void row(const F& f, const In* x, Out* out, int64_t begin, int64_t end, bool past_caches) {
  using VIn = decltype(load_input(x));
  using VOut = std::conditional_t<std::is_same_v<Out, uint8_t>, vi, vf>;
  const auto at = [&](const In* from, Out* to, auto count, auto streamed) __attribute__((always_inline)) {
    constexpr int n = decltype(count)::value;
    VIn a[n];
    VOut b[n];
    for (int i = 0; i < n; ++i) a[i] = load_input(from + i * kLanes);
    f.apply(a, b);
    if constexpr (decltype(streamed)::value) {
      stream_output(to, b);
    } else {
      store_output(to, b);
    }
  };
  constexpr std::integral_constant<int, kAhead> many{};
  constexpr std::integral_constant<int, 1> one{};
  constexpr std::false_type stored{};
  const auto some = [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    In from[kLanes] = {};
    Out to[kLanes];
    std::memcpy(from, x + c, static_cast<size_t>(n) * sizeof(In));
    at(from, to, one, stored);
    std::memcpy(out + c, to, static_cast<size_t>(n) * sizeof(Out));
  };
  int64_t c = begin;
  if constexpr (std::is_same_v<Out, float>) {
    constexpr int64_t kBytes = kLanes * sizeof(Out);
    const int64_t ahead = -(reinterpret_cast<intptr_t>(out + c)) & (kBytes - 1);
    if (past_caches && ahead % sizeof(Out) == 0) {
      const int64_t first = std::min<int64_t>(ahead / sizeof(Out), end - c);
      if (first > 0) some(c, first), c += first;
      for (; c + kAhead * kLanes <= end; c += kAhead * kLanes) at(x + c, out + c, many, std::true_type{});
    }
  }
  for (; c + kAhead * kLanes <= end; c += kAhead * kLanes) at(x + c, out + c, many, stored);
  for (; c + kLanes <= end; c += kLanes) at(x + c, out + c, one, stored);
  if (c < end) some(c, end - c);
}

// Units: columns of one row where there is one, else rows.
inline int64_t unit_of(const LutParams& p) {
  return p.rows == 1 ? kUnit : std::max<int64_t>(1, kUnit / std::max<int64_t>(1, p.columns));
}
inline int64_t units(const LutParams& p) { return ceil_div(p.rows == 1 ? p.columns : p.rows, unit_of(p)); }

template <class In, class Out, class F>
void rows(const LutParams& given, const Tables& tables, int64_t begin, int64_t end) {
  const LutParams p = given;  // stores may alias anything
  const F f(tables, p);
  const int64_t unit = unit_of(p), all = p.rows == 1 ? p.columns : p.rows;
  const int64_t first = begin * unit, last = std::min(end * unit, all);
  const bool past_caches = p.rows == 1 && p.columns * static_cast<int64_t>(sizeof(Out)) >= kPastCaches;
  const In* const x = static_cast<const In*>(p.x);
  Out* const out = static_cast<Out*>(p.out);
  if (p.rows == 1) {
    row(f, x, out, first, last, past_caches);
    if (past_caches) stream_fence();
    return;
  }
  for (int64_t r = first; r < last; ++r) row(f, x + row_start(p, r), out + r * p.columns, 0, p.columns, false);
}

// Calls f with the bits of a code as a constant.
template <class F>
EFFVIT_INLINE void dispatch_bits(int codes, const F& f) {
  if (codes <= 2) return f(std::integral_constant<int, 1>{});
  if (codes <= 4) return f(std::integral_constant<int, 2>{});
  if (codes <= 8) return f(std::integral_constant<int, 3>{});
  if (codes <= 16) return f(std::integral_constant<int, 4>{});
  if (codes <= 32) return f(std::integral_constant<int, 5>{});
  if (codes <= 64) return f(std::integral_constant<int, 6>{});
  if (codes <= 128) return f(std::integral_constant<int, 7>{});
  f(std::integral_constant<int, 8>{});
}

inline void quantize(const LutParams& p, int64_t begin, int64_t end) {
  dispatch_bits(p.codes, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    Tables tables;
    tables.fill(p, kBits);
    dispatch_dtype(p.dtype, [&](auto type) { rows<decltype(type), uint8_t, Quantize<kBits>>(p, tables, begin, end); });
  });
}
inline void fake_quantize(const LutParams& p, int64_t begin, int64_t end) {
  dispatch_bits(p.codes, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    Tables tables;
    tables.fill(p, kBits);
    dispatch_dtype(
        p.dtype, [&](auto type) { rows<decltype(type), decltype(type), FakeQuantize<kBits>>(p, tables, begin, end); });
  });
}
inline void dequantize(const LutParams& p, int64_t begin, int64_t end) {
  dispatch_bits(p.codes, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    Tables tables;
    tables.fill(p, kBits);
    dispatch_dtype(p.out_dtype,
                   [&](auto type) { rows<uint8_t, decltype(type), Dequantize<kBits>>(p, tables, begin, end); });
  });
}

}  // namespace lut_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
