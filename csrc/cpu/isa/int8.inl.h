// Products of int8 operands with exact int32 sums: dot products of bytes and AMX tiles where the ISA has them, products
// of int16 everywhere else; integers read and written as vectors. Emulated ISAs run the same code on ordinary
// instructions.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {

#if defined(EFFVIT_HAS_INT8_DOT)
constexpr bool kInt8Dot = true;
#else
constexpr bool kInt8Dot = false;
#endif
#if defined(EFFVIT_HAS_INT8_DOT) && defined(EFFVIT_HAS_TILES)
constexpr bool kInt8Tiles = true;
#else
constexpr bool kInt8Tiles = false;
#endif

EFFVIT_INLINE void store(int32_t* p, vi v) { *reinterpret_cast<vi_unaligned*>(p) = v; }

EFFVIT_INLINE vi set1(int32_t x) {
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_set1_epi32(x);
#elif defined(EFFVIT_HAS_AVX2)
  return (vi)_mm256_set1_epi32(x);
#else
  return vi{} + x;
#endif
}

EFFVIT_INLINE int32_t load_word(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

// The first n bytes, zeros above; 0 <= n <= 4.
EFFVIT_INLINE int32_t load_bytes(const void* p, int n) {
  int32_t x = 0;
  std::memcpy(&x, p, static_cast<size_t>(n));
  return x;
}

EFFVIT_INLINE vf to_floats(vi x) { return __builtin_convertvector(x, vf); }

// To the nearest integer, ties to even; of numbers between -2^22 and 2^22.
EFFVIT_INLINE vi round_to_int(vf x) {
  return (vi)(x + set1(12582912.f)) - 0x4b400000;  // 1.5 * 2^23, whose bits are taken off again
}

// The low bytes.
EFFVIT_INLINE void store(int8_t* p, vi x) {
#if defined(EFFVIT_HAS_AVX512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(EFFVIT_HAS_AVX2)
  const __m256i low =
      _mm256_shuffle_epi8((__m256i)x, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0,
                                                       4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const int32_t halves[2] = {_mm256_extract_epi32(low, 0), _mm256_extract_epi32(low, 4)};
  std::memcpy(p, halves, 8);
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(x[i]);
#endif
}

// Their low halves.
EFFVIT_INLINE void store(int16_t* p, vi x) {
#if defined(EFFVIT_HAS_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(EFFVIT_HAS_AVX2)
  const __m256i low = _mm256_and_si256((__m256i)x, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int16_t>(x[i]);
#endif
}

// Sums of neighbours: of a, then of b.
EFFVIT_INLINE vi add_pairs(vi a, vi b) {
#if EFFVIT_LANES == 16
  const vi even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const vi odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif EFFVIT_LANES == 8
  const vi even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  const vi odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  const vi even = __builtin_shufflevector(a, b, 0, 2, 4, 6), odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
  return even + odd;
}

#if defined(EFFVIT_HAS_INT8_DOT)

// acc + in every lane the sum of four products, of unsigned bytes of w and signed bytes of x. Wraps.
EFFVIT_INLINE vi dot_bytes(vi acc, vi w, vi x) {
#if defined(EFFVIT_HAS_AVX512_VNNI)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(EFFVIT_HAS_AVX_VNNI)
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t u = static_cast<uint32_t>(w[i]), s = static_cast<uint32_t>(x[i]);
    int32_t sum = 0;
    for (int b = 0; b < 32; b += 8) {
      sum += static_cast<int32_t>(u >> b & 255) * static_cast<int8_t>(s >> b & 255);
    }
    acc[i] = static_cast<int32_t>(static_cast<uint32_t>(acc[i]) + static_cast<uint32_t>(sum));
  }
  return acc;
#endif
}

#endif

// Vectors of twice as many int16.
typedef int16_t vh __attribute__((vector_size(4 * EFFVIT_LANES)));

// acc + in every lane the sum of two products of int16. Wraps.
EFFVIT_INLINE vi dot_halves(vi acc, vh a, vh b) {
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_add_epi32((__m512i)acc, _mm512_madd_epi16((__m512i)a, (__m512i)b));
#elif defined(EFFVIT_HAS_AVX2)
  return (vi)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#else
  vu sum = (vu)acc;
  for (int i = 0; i < kLanes; ++i) {
    sum[i] += static_cast<uint32_t>(int32_t{a[2 * i]} * b[2 * i]) +
              static_cast<uint32_t>(int32_t{a[2 * i + 1]} * b[2 * i + 1]);
  }
  return (vi)sum;
#endif
}

// 2 * kLanes unsigned bytes.
EFFVIT_INLINE vh load_halves(const uint8_t* p) {
#if defined(EFFVIT_HAS_AVX512)
  return (vh)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(EFFVIT_HAS_AVX2)
  return (vh)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vh v;
  for (int i = 0; i < 2 * kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// Four int16, as often as they fit.
EFFVIT_INLINE vh broadcast_halves(const int16_t* p) {
  int64_t four;
  std::memcpy(&four, p, 8);
#if defined(EFFVIT_HAS_AVX512)
  return (vh)_mm512_set1_epi64(four);
#elif defined(EFFVIT_HAS_AVX2)
  return (vh)_mm256_set1_epi64x(four);
#else
  vh v;
  for (int i = 0; i < kLanes / 2; ++i) std::memcpy(reinterpret_cast<char*>(&v) + 8 * i, &four, 8);
  return v;
#endif
}

EFFVIT_INLINE int32_t reduce_add(vi v) {
#if defined(EFFVIT_HAS_AVX512)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
#endif
}

#if defined(EFFVIT_HAS_INT8_DOT)
// The first n < 4 * kLanes bytes, zeros beyond.
EFFVIT_INLINE vi load_first_bytes(const int8_t* p, int n) {
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p);
#else
  vi x{};
  std::memcpy(&x, p, static_cast<size_t>(n));
  return x;
#endif
}
#endif

// Sum of n int8; n at most 131072.
EFFVIT_INLINE int32_t sum_bytes(const int8_t* p, int64_t n) {
  int64_t i = 0;
#if defined(EFFVIT_HAS_INT8_DOT)
  vi sums{}, x{};
  const vi ones = set1(0x01010101);
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    std::memcpy(&x, p + i, sizeof(x));
    sums = dot_bytes(sums, ones, x);
  }
  if (i < n) sums = dot_bytes(sums, ones, load_first_bytes(p + i, static_cast<int>(n - i)));
  return reduce_add(sums);
#else
  int32_t total = 0;
  for (; i < n; ++i) total += p[i];
  return total;
#endif
}

#if defined(EFFVIT_HAS_INT8_DOT) && defined(EFFVIT_HAS_TILES)
// c += a b: 16x64 int8 of a, 64x16 of b in groups of four rows, unsigned; c 16x16 int32.
#if defined(EFFVIT_HAS_EMULATED_TILES)
#define EFFVIT_TILE_DOT_BYTES(c, a, b) emulated_dot_bytes(c, a, b)
inline void emulated_dot_bytes(int c, int a, int b) {
  TileState& s = tile_state();
  for (int m = 0; m < 16; ++m) {
    vi acc;
    std::memcpy(&acc, s.rows[c][m], 64);
    for (int k = 0; k < 16; ++k) {
      vi w;
      std::memcpy(&w, s.rows[b][k], 64);
      acc = dot_bytes(acc, w, set1(load_word(s.rows[a][m] + 4 * k)));
    }
    std::memcpy(s.rows[c][m], &acc, 64);
  }
}
#else
#define EFFVIT_TILE_DOT_BYTES(c, a, b) _tile_dpbsud(c, a, b)
#endif
#endif

}  // namespace effvit::cpu::EFFVIT_ISA_NAME
