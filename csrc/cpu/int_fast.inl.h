// What makes integer row-wise operators quick on a CPU: rows of fewer bits, results packed by four vectors, rescaling
// in float64 where that is exact, LayerNorm in float32 where its rounding cannot be in doubt, tables of bytes. Part of
// int_rows.inl.h.
#pragma once

typedef double vd __attribute__((vector_size(4 * EFFVIT_LANES)));
typedef double vd_unaligned __attribute__((vector_size(4 * EFFVIT_LANES), aligned(8), may_alias));
typedef int32_t vh __attribute__((vector_size(2 * EFFVIT_LANES)));
typedef int16_t vs __attribute__((vector_size(4 * EFFVIT_LANES)));
typedef int16_t vs_unaligned __attribute__((vector_size(4 * EFFVIT_LANES), aligned(2), may_alias));
typedef uint8_t vb __attribute__((vector_size(4 * EFFVIT_LANES)));
typedef uint8_t vb_unaligned __attribute__((vector_size(4 * EFFVIT_LANES), aligned(1), may_alias));

// ---- rows of any dtype ----------------------------------------------------------------------------------------------

template <class T>
void widen(const T* p, int64_t n, int32_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load_integers(p + i));
  for (; i < n; ++i) to[i] = p[i];
}
// A row that starts at an element of p, in 32 bits: where it is, or a copy in `room`.
inline const int32_t* in_32_bits(const void* p, DType type, int64_t start, int64_t n, int32_t* room) {
  if (type == DType::kInt32) return static_cast<const int32_t*>(p) + start;
  if (type == DType::kInt16) widen(static_cast<const int16_t*>(p) + start, n, room);
  if (type == DType::kInt8) widen(static_cast<const int8_t*>(p) + start, n, room);
  if (type == DType::kUInt8) widen(static_cast<const uint8_t*>(p) + start, n, room);
  return room;
}

// Four vectors between low and high, as T. Both fit into T or, of T one byte, into it without a sign.
template <class T>
EFFVIT_INLINE void store_four(T* p, const vi (&x)[4], int32_t low, int32_t high) {
#if defined(EFFVIT_HAS_AVX2) && EFFVIT_LANES == 8
  if constexpr (sizeof(T) < 4) {
    const __m256i least = _mm256_set1_epi16(static_cast<int16_t>(low));
    const __m256i most = _mm256_set1_epi16(static_cast<int16_t>(high));
    const auto pack = [&](vi a, vi b) __attribute__((always_inline)) {  // lanes of 128 bits: a, b, a, b
      const __m256i y = _mm256_packs_epi32((__m256i)a, (__m256i)b);
      return _mm256_min_epi16(_mm256_max_epi16(y, least), most);
    };
    const __m256i a = pack(x[0], x[1]), b = pack(x[2], x[3]);
    if constexpr (sizeof(T) == 2) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(a, 0xd8));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm256_permute4x64_epi64(b, 0xd8));
    } else {
      const __m256i y = low < 0 ? _mm256_packs_epi16(a, b) : _mm256_packus_epi16(a, b);
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(y, order));
    }
    return;
  }
#endif
  for (int k = 0; k < 4; ++k) store(p + k * kLanes, least(most(x[k], set1(low)), set1(high)));
}

// ---- rescaling in float64 -------------------------------------------------------------------------------------------
//
// z m / 2^c, |m| < 2^31, is z s with s = m / 2^c, which float64 holds. Where |z| < 2^22 it holds the product as well,
// and adding 1.5 * 2^52 rounds it to an integer, ties to even, whose low 32 bits are then those of the sum: right where
// |z s| < 2^31.

constexpr double kToIntegers = 6755399441055744.0;
constexpr int32_t kExactBits = 22;

#if EFFVIT_LANES == 16
EFFVIT_INLINE vh lower_half(vi x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
EFFVIT_INLINE vh upper_half(vi x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }
EFFVIT_INLINE vi low_words(vul a, vul b) {
  return __builtin_shufflevector((vi)a, (vi)b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
#elif EFFVIT_LANES == 8
EFFVIT_INLINE vh lower_half(vi x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3); }
EFFVIT_INLINE vh upper_half(vi x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7); }
EFFVIT_INLINE vi low_words(vul a, vul b) { return __builtin_shufflevector((vi)a, (vi)b, 0, 2, 4, 6, 8, 10, 12, 14); }
#else
EFFVIT_INLINE vh lower_half(vi x) { return __builtin_shufflevector(x, x, 0, 1); }
EFFVIT_INLINE vh upper_half(vi x) { return __builtin_shufflevector(x, x, 2, 3); }
EFFVIT_INLINE vi low_words(vul a, vul b) { return __builtin_shufflevector((vi)a, (vi)b, 0, 2, 4, 6); }
#endif

EFFVIT_INLINE vd to_float64(vh z) {
#if defined(EFFVIT_HAS_AVX512)
  return (vd)_mm512_cvtepi32_pd((__m256i)z);
#elif defined(EFFVIT_HAS_AVX2) && EFFVIT_LANES == 8
  return (vd)_mm256_cvtepi32_pd((__m128i)z);
#else
  return __builtin_convertvector(z, vd);
#endif
}
EFFVIT_INLINE vul scaled(vh z, vd s) { return (vul)(to_float64(z) * s + kToIntegers); }

inline double scale_of(int32_t m, int32_t c) {
  const int64_t bits = int64_t{1023 - std::min(std::max(c, 1), 61)} << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return m * power;
}
// Those of all columns, zeros up to whole vectors; returns the largest one.
inline double scales_of(const int32_t* m, const int32_t* c, int64_t columns, double* s) {
  double largest = 0;
  for (int64_t i = 0; i < columns; ++i) s[i] = scale_of(m[i], c[i]), largest = std::max(largest, std::abs(s[i]));
  for (int64_t i = columns; i < columns + kLanes; ++i) s[i] = 0;
  return largest;
}
// The largest |z| of a dtype whose products are exact; larger ones are looked for.
inline double most_of(DType type) {
  return type == DType::kInt32 ? double(1 << kExactBits) : type == DType::kInt16 ? 32768. : 255.;
}

// A row rescaled, with the rescaled residual where there is one. False where a z has more than kExactBits.
template <bool kResidual, class T>
EFFVIT_INLINE bool scale_row(const int32_t* x, const double* s, const int32_t* residual, const double* s2, int64_t n,
                             int32_t low, int32_t high, T* out) {
  const uint32_t half = uint32_t{1} << kExactBits;
  vu seen{};
  const auto results = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const auto of = [&](const int32_t* z, const double* s, vul(&y)[2]) __attribute__((always_inline)) {
      const vi v = load_first(z + i, count);
      seen |= (vu)v + half;
      y[0] = scaled(lower_half(v), *reinterpret_cast<const vd_unaligned*>(s + i));
      y[1] = scaled(upper_half(v), *reinterpret_cast<const vd_unaligned*>(s + i + kLanes / 2));
    };
    vul y[2];
    of(x, s, y);
    if constexpr (kResidual) {
      vul more[2];
      of(residual, s2, more);
      y[0] += more[0], y[1] += more[1];
    }
    return low_words(y[0], y[1]);
  };
  const auto block = [&](int64_t i) __attribute__((always_inline)) {
    vi y[4];
    for (int k = 0; k < 4; ++k) y[k] = results(i + k * kLanes, kLanes);
    store_four(out + i, y, low, high);
  };
  const auto one = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    store_first(out + i, least(most(results(i, count), set1(low)), set1(high)), count);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) block(i);
  for (; i + kLanes <= n; i += kLanes) one(i, kLanes);
  if (i < n) one(i, n - i);
  return !any((vi)(seen >> (kExactBits + 1)) != 0);
}

// ---- LayerNorm in float32 -------------------------------------------------------------------------------------------
//
// A result of 8 bits is r = z s + offset, rounded, with z = floor(y f / 2) + bias and s = m / 2^c. In float32
// g = y (f / 2) s + (bias s + offset) has at most four roundings in its product P, one each of bias s + offset = B and
// of g, and lacks what the floor takes off, less than s: |g - r| <= 2^-24 (4 |P| + |B| + |g|) + s, to first order, with
// |P| <= |g| + |B|. Where g is further than that from halves of integers, both round to the same integer; a block with
// one that is not is done again in integers. Beyond 8 bits the bound grows with |g| by less than |g| itself, so that
// what saturates does in either.

constexpr int64_t kLongest = int64_t{1} << 24;  // columns whose sums of squares of 16 bits fit well

struct NormTable {
  float *s, *b;  // [columns] each: s, B
  float limit;  // how far from an integer g may be; 0: not in float32
};

inline void fill(NormTable& t, const IntRowsData& p) {
  double largest_s = 0, largest_b = 0;
  for (int64_t i = 0; i < p.columns; ++i) {
    const double s = scale_of(p.vectors[2][i], p.vectors[3][i]);
    const double b = (p.vectors[0] ? p.vectors[0][i] * s : 0.) + (p.vectors[1] ? p.vectors[1][i] : 0);
    t.s[i] = static_cast<float>(s), t.b[i] = static_cast<float>(b);
    largest_s = std::max(largest_s, std::abs(s)), largest_b = std::max(largest_b, std::abs(b));
  }
  const double error = (5 * (p.high + 2 + largest_b) + 8) * 0x1.1p-24 + 1.01 * largest_s;
  const bool will_do = largest_s * 0x1p31 + largest_b < 0x1p24 && error < 1. / 16;
  t.limit = will_do ? static_cast<float>(0.5 - 1.1 * error) : 0.f;
}

// Sums of products of pairs.
EFFVIT_INLINE vi dot_pairs(vs a, vs b) {
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(EFFVIT_HAS_AVX2)
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  const vi even = (((vi)a << 16) >> 16) * (((vi)b << 16) >> 16), odd = ((vi)a >> 16) * ((vi)b >> 16);
  return (vi)((vu)even + (vu)odd);
#endif
}
EFFVIT_INLINE vi to_nearest(vf x) {
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(EFFVIT_HAS_AVX2)
  return (vi)_mm256_cvtps_epi32((__m256)x);
#else  // halves of integers away from 0: nobody trusts them
  return __builtin_convertvector(x + (x < 0.f ? set1(-0.5f) : set1(0.5f)), vi);
#endif
}

struct RowOf16 {
  const int16_t* x;
  int64_t sum;
  uint64_t squares;
};

// Bytes in 16 bits.
template <class T>
void widen_to_16(const T* p, int64_t n, int16_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = p[i];
}
// A row of int32 in 16 bits, if it fits.
inline bool narrow(const int32_t* x, int64_t n, int16_t* to) {
  vu seen{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    vi y[4];
    for (int k = 0; k < 4; ++k) y[k] = load(x + i + k * kLanes), seen |= (vu)y[k] + 32768u;
    store_four(to + i, y, -32768, 32767);
  }
  uint32_t rest = 0;
  for (; i < n; ++i) to[i] = static_cast<int16_t>(x[i]), rest |= static_cast<uint32_t>(x[i]) + 32768u;
  return rest < 65536 && !any((vi)(seen >> 16) != 0);
}

inline void measure(RowOf16& row, int64_t n) {
  const int16_t* const x = row.x;
  constexpr int64_t kStep = 2 * kLanes, kMost = int64_t{1} << 14;  // vectors before 32 bits could overflow
  const vs ones = vs{} + int16_t{1};
  int64_t i = 0, sum = 0;
  uint64_t squares = 0;
  while (i + kStep <= n) {
    const int64_t last = std::min(n, i + kMost * kStep);
    vi sums{};
    vu wrapped{}, tops{};  // as in reduce: the sum less its high halves is that of the low ones
    for (; i + kStep <= last; i += kStep) {
      const vs y = *reinterpret_cast<const vs_unaligned*>(x + i);
      const vu square = (vu)dot_pairs(y, y);
      sums += dot_pairs(y, ones);
      tops += square >> 16u, wrapped += square;
    }
    sum += sum_of(sums);
    squares += sum_of(tops) * 65536 + sum_of(wrapped - (tops << 16u));
  }
  for (; i < n; ++i) sum += x[i], squares += static_cast<uint32_t>(x[i] * x[i]);
  row.sum = sum, row.squares = squares;
}

// A row of LayerNorm with results of one byte, if float32 will do for it; of four vectors of columns at least.
template <class F, class T, class Row>
EFFVIT_INLINE bool norm_row(const IntRowsData& p, const NormTable& table, RowOf16& x, T* out) {
  const int64_t n = p.columns;
  measure(x, n);
  Row row{};
  F::template finish<0>(p, row, x.sum, 0);
  const int64_t mean = row.mean;
  if (std::abs(mean) > F::kFurthest - 32768) return false;  // else nothing of 16 bits is further than that
  F::template finish<1>(p, row, static_cast<int64_t>(x.squares) - 2 * mean * x.sum + n * mean * mean, 0);
  const vf half = set1(static_cast<float>(row.f) * 0.5f);
  const vi center = set1(row.mean);
  const float *const s = table.s, *const b = table.b;
  const int16_t* const source = x.x;
  const int32_t low = p.low, high = p.high;
  const vf limit = set1(table.limit);
  const auto block = [&](int64_t i) __attribute__((always_inline)) {
    vi y[4];
    vf furthest{};
    for (int k = 0; k < 4; ++k) {
      const int64_t at = i + k * kLanes;
      const vf t = __builtin_convertvector(load_integers(source + at) - center, vf) * half;
      const vf g = fma(t, load(s + at), load(b + at));
      y[k] = to_nearest(g);
      const vf rest = g - __builtin_convertvector(y[k], vf);
      furthest = max((vf)((vi)rest & 0x7fffffff), furthest);
    }
    if (__builtin_expect(any(furthest > limit), 0)) {
      for (int k = 0; k < 4; ++k) {
        const int64_t at = i + k * kLanes;
        vi v[F::kVectors + 1] = {};
        for (int j = 0; j < F::kVectors; ++j) {
          if (p.vectors[j]) v[j] = load(p.vectors[j] + at);
        }
        const vi z = load_integers(source + at);
        y[k] = F::map(p, row, z, z - center, vi{}, v);
      }
    }
    store_four(out + i, y, low, high);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) block(i);
  if (i < n) block(n - 4 * kLanes);  // some once more
  return true;
}

// ---- tables of bytes ------------------------------------------------------------------------------------------------

#if defined(EFFVIT_HAS_AVX512)
// A table of 256 bytes in four registers, as 128 words of two.
struct TableOfBytes {
  __m512i w0, w1, w2, w3;

  explicit TableOfBytes(const void* at) {
    const __m512i* const words = static_cast<const __m512i*>(at);
    w0 = words[0], w1 = words[1], w2 = words[2], w3 = words[3];
  }
  // Of 32 indices of 0 to 255 in words.
  EFFVIT_INLINE __m256i operator()(__m512i k) const {
    const __m512i word = _mm512_srli_epi16(k, 1), one = _mm512_set1_epi16(1);
    const __m512i low = _mm512_permutex2var_epi16(w0, word, w1), high = _mm512_permutex2var_epi16(w2, word, w3);
    __m512i y = _mm512_mask_mov_epi16(low, _mm512_movepi16_mask(_mm512_slli_epi16(k, 8)), high);
    y = _mm512_mask_srli_epi16(y, _mm512_test_epi16_mask(k, one), y, 8);
    return _mm512_cvtepi16_epi8(y);
  }
};
#endif

// Results at[x + shift], modulo 256, of bytes x; `at` lies at a multiple of 64.
template <class T>
EFFVIT_INLINE void look_up_bytes(const T* at, const uint8_t* x, int64_t n, uint8_t shift, T* out) {
  int64_t i = 0;
#if defined(EFFVIT_HAS_AVX512)
  if constexpr (sizeof(T) == 1) {
    const TableOfBytes of(at);
    const __m256i offset = _mm256_set1_epi8(static_cast<char>(shift));
    for (; i + 32 <= n; i += 32) {
      const __m256i k = _mm256_add_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)), offset);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), of(_mm512_cvtepu8_epi16(k)));
    }
  }
#elif defined(EFFVIT_HAS_AVX2) && EFFVIT_LANES == 8
  if constexpr (sizeof(T) == 1) {
    // 16 shuffles of tables of 16 by the low bits; of their results the high bits choose, one by one.
    const __m256i offset = _mm256_set1_epi8(static_cast<char>(shift)), low = _mm256_set1_epi8(15);
    const __m128i* const tables = reinterpret_cast<const __m128i*>(at);
    for (; i + 32 <= n; i += 32) {
      const __m256i k = _mm256_add_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i)), offset);
      const __m256i within = _mm256_and_si256(k, low);
      const __m256i bit6 = _mm256_slli_epi16(k, 1), bit5 = _mm256_slli_epi16(k, 2), bit4 = _mm256_slli_epi16(k, 3);
      const auto of = [&](int t) __attribute__((always_inline)) {
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(tables + t)), within);
      };
      const auto two = [&](int t) __attribute__((always_inline)) { return _mm256_blendv_epi8(of(t), of(t + 1), bit4); };
      const auto four = [&](int t)
                            __attribute__((always_inline)) { return _mm256_blendv_epi8(two(t), two(t + 2), bit5); };
      const auto eight = [&](int t)
                             __attribute__((always_inline)) { return _mm256_blendv_epi8(four(t), four(t + 4), bit6); };
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_blendv_epi8(eight(0), eight(8), k));
    }
  }
#endif
  for (; i < n; ++i) out[i] = at[static_cast<uint8_t>(x[i] + shift)];
}

// The largest and the smallest of bytes, which `flip` gives an order without signs.
inline void range_of(const uint8_t* x, int64_t n, uint8_t flip, uint8_t& largest, uint8_t& smallest) {
  vb high{}, low = ~vb{};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    const vb y = *reinterpret_cast<const vb_unaligned*>(x + i) ^ flip;
    high = y > high ? y : high, low = y < low ? y : low;
  }
  uint8_t most = 0, least = 255;
  for (int k = 0; k < 4 * kLanes; ++k)
    most = std::max<uint8_t>(most, high[k]), least = std::min<uint8_t>(least, low[k]);
  for (; i < n; ++i) {
    const uint8_t y = x[i] ^ flip;
    most = std::max(most, y), least = std::min(least, y);
  }
  largest = most, smallest = least;
}
