// Products of small integers with exact int32 sums, on words of 32 bits: four bytes or two int16 at once; their
// packing, and the arithmetic of integer-only ops on vectors. int8_matmul and int_attention share it.
//
// A is rows of words along K, of which one is broadcast; B is panels of kLanes columns, [words of K][kLanes], so that a
// vector is a word of every column. What a word is, and how two are multiplied, says a Dot:
//   Halves        two int16, everywhere
//   SignedRows    four bytes, those of A with a sign, those of B without, where there are dot products of bytes
//   UnsignedRows  the other way round
//   ShortSums     likewise, by AVX2's products of bytes with int16 sums: of numbers whose sums fit into int16
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace int_impl {

using EFFVIT_ISA_NAME::least;  // beside those of int_math.h
using EFFVIT_ISA_NAME::most;
using EFFVIT_ISA_NAME::mul_high;
using EFFVIT_ISA_NAME::select;

#define EFFVIT_FN EFFVIT_INLINE
#include "../rows/int_math.h"
template <>
struct UnsignedOf<vi> {
  using type = vu;
};
#undef EFFVIT_FN

// The lanes below n; the others `other`.
EFFVIT_INLINE vi only(vi x, int64_t n, int32_t other) {
  return n >= kLanes ? x : select(lanes_below(static_cast<int>(n)), x, set1(other));
}
// Of all lanes, by f of two numbers.
template <class F>
EFFVIT_INLINE int32_t fold(vi x, const F& f) {
  alignas(64) int32_t some[kLanes];
  store(some, x);
  int32_t y = some[0];
  for (int i = 1; i < kLanes; ++i) y = f(y, some[i]);
  return y;
}

// What a vector is stored as: of one byte only the low bits count.
template <class T>
using Stored = std::conditional_t<sizeof(T) == 1, int8_t, T>;
// The first n integers, zeros beyond.
template <class T>
EFFVIT_INLINE vi load_first(const T* p, int64_t n) {
  if (n >= kLanes) return load_integers(p);
  alignas(64) T some[kLanes] = {};
  std::memcpy(some, p, static_cast<size_t>(n) * sizeof(T));
  return load_integers(some);
}
template <class T>
EFFVIT_INLINE void store_first(T* p, vi x, int64_t n) {
  if (n >= kLanes) return store(reinterpret_cast<Stored<T>*>(p), x);
  alignas(64) Stored<T> some[kLanes];
  store(some, x);
  std::memcpy(p, some, static_cast<size_t>(n) * sizeof(T));
}

// Whole groups of four vectors of numbers that T holds.
template <class T>
EFFVIT_INLINE void store_four(T* p, vi a, vi b, vi c, vi d) {
#if defined(EFFVIT_HAS_AVX2) && EFFVIT_LANES == 8
  if constexpr (sizeof(T) < 4) {
    const __m256i ab = _mm256_packs_epi32((__m256i)a, (__m256i)b);  // 0-3 8-11 4-7 12-15
    const __m256i cd = _mm256_packs_epi32((__m256i)c, (__m256i)d);
    __m256i* const to = reinterpret_cast<__m256i*>(p);
    if constexpr (sizeof(T) == 1) {
      const __m256i all = std::is_signed_v<T> ? _mm256_packs_epi16(ab, cd) : _mm256_packus_epi16(ab, cd);
      _mm256_storeu_si256(to, _mm256_permutevar8x32_epi32(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    } else {
      _mm256_storeu_si256(to, _mm256_permute4x64_epi64(ab, 0xd8));
      _mm256_storeu_si256(to + 1, _mm256_permute4x64_epi64(cd, 0xd8));
    }
    return;
  }
#endif
  Stored<T>* const to = reinterpret_cast<Stored<T>*>(p);
  store(to, a), store(to + kLanes, b), store(to + 2 * kLanes, c), store(to + 3 * kLanes, d);
}

// ---- x m / 2^c -----------------------------------------------------------------------------------------------------

// In float64 where the ISA has a fused multiply-add. Exact: m has 31 bits, so m / 2^c is a float64; the product is
// rounded once, to a multiple of the last bit of 1.5 * 2^52, which is 1, and 1.5 * 2^52 is even, so a tie goes to the
// even number. Beyond 2^51 that bit is larger, but then the result is beyond low and high in any case. Between them,
// the low half of the float64 is the int32.
class Rescaler {
 public:
  explicit Rescaler(const Rescale& r)
      : r_(r),
        factor_(r.multiplier / static_cast<double>(uint64_t{1} << r.shift)),
        low_(kMagic + r.low),
        high_(kMagic + r.high) {}

  EFFVIT_INLINE vi operator()(vi z) const {
    if (r_.multiplier == 0) return least(most(z, set1(r_.low)), set1(r_.high));
#if defined(EFFVIT_HAS_AVX512)
    const __m512d f = _mm512_set1_pd(factor_), magic = _mm512_set1_pd(kMagic);
    const __m512d low = _mm512_set1_pd(low_), high = _mm512_set1_pd(high_);
    const __m256i z0 = _mm512_castsi512_si256((__m512i)z), z1 = _mm512_extracti64x4_epi64((__m512i)z, 1);
    __m512d a = _mm512_fmadd_pd(_mm512_cvtepi32_pd(z0), f, magic);
    __m512d b = _mm512_fmadd_pd(_mm512_cvtepi32_pd(z1), f, magic);
    a = _mm512_min_pd(_mm512_max_pd(a, low), high), b = _mm512_min_pd(_mm512_max_pd(b, low), high);
    const __m256i y0 = _mm512_cvtepi64_epi32(_mm512_castpd_si512(a)),
                  y1 = _mm512_cvtepi64_epi32(_mm512_castpd_si512(b));
    return (vi)_mm512_inserti64x4(_mm512_castsi256_si512(y0), y1, 1);
#elif defined(EFFVIT_HAS_AVX2) && EFFVIT_LANES == 8
    const __m256d f = _mm256_set1_pd(factor_), magic = _mm256_set1_pd(kMagic);
    const __m256d low = _mm256_set1_pd(low_), high = _mm256_set1_pd(high_);
    const __m128i z0 = _mm256_castsi256_si128((__m256i)z), z1 = _mm256_extracti128_si256((__m256i)z, 1);
    __m256d a = _mm256_fmadd_pd(_mm256_cvtepi32_pd(z0), f, magic);
    __m256d b = _mm256_fmadd_pd(_mm256_cvtepi32_pd(z1), f, magic);
    a = _mm256_min_pd(_mm256_max_pd(a, low), high), b = _mm256_min_pd(_mm256_max_pd(b, low), high);
    const __m256 both = _mm256_shuffle_ps(_mm256_castpd_ps(a), _mm256_castpd_ps(b), 0x88);  // 0 1 4 5 2 3 6 7
    return (vi)_mm256_permute4x64_epi64(_mm256_castps_si256(both), 0xd8);
#else
    for (int i = 0; i < kLanes; ++i) z[i] = rescale(z[i], r_.multiplier, r_.shift, r_.low, r_.high);
    return z;
#endif
  }

 private:
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  Rescale r_;
  double factor_, low_, high_;
};

// ---- products ------------------------------------------------------------------------------------------------------

struct Halves {
  static EFFVIT_INLINE vi add(vi sum, vi b, vi a) {
#if defined(EFFVIT_HAS_AVX512_VNNI)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)b, (__m512i)a);
#elif defined(EFFVIT_HAS_AVX_VNNI)
    return (vi)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)b, (__m256i)a);
#else
    return dot_halves(sum, (vh)b, (vh)a);
#endif
  }
  static EFFVIT_INLINE vi finish(vi sum) { return sum; }
};

#if defined(EFFVIT_HAS_INT8_DOT)
struct SignedRows {
  static EFFVIT_INLINE vi add(vi sum, vi b, vi a) { return dot_bytes(sum, b, a); }
  static EFFVIT_INLINE vi finish(vi sum) { return sum; }
};
struct UnsignedRows {
  static EFFVIT_INLINE vi add(vi sum, vi b, vi a) { return dot_bytes(sum, a, b); }
  static EFFVIT_INLINE vi finish(vi sum) { return sum; }
};
#else
struct ShortSums {
  static EFFVIT_INLINE vi add(vi sum, vi b, vi a) {
#if defined(EFFVIT_HAS_AVX512)
    return (vi)_mm512_add_epi16((__m512i)sum, _mm512_maddubs_epi16((__m512i)a, (__m512i)b));
#elif defined(EFFVIT_HAS_AVX2) && EFFVIT_LANES == 8
    return (vi)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)a, (__m256i)b));
#else
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t u = static_cast<uint32_t>(a[i]), s = static_cast<uint32_t>(b[i]),
                     t = static_cast<uint32_t>(sum[i]);
      const auto product = [&](int at) {
        return static_cast<uint32_t>(static_cast<int32_t>(u >> at & 255) * static_cast<int8_t>(s >> at & 255));
      };
      sum[i] = static_cast<int32_t>(((t + product(0) + product(8)) & 0xffff) |
                                    ((t & 0xffff0000) + ((product(16) + product(24)) << 16)));
    }
    return sum;
#endif
  }
  static EFFVIT_INLINE vi finish(vi sum) { return dot_halves(vi{}, (vh)sum, (vh)set1(0x00010001)); }
};
#endif

constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // times two vectors, of 32 or 16 registers
constexpr int kTileVectors = 2;

template <int kMost, class F>
EFFVIT_INLINE void with_constant(int n, const F& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_constant<kMost - 1>(n, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// out [kRows][kVectors * kLanes] = A B over `words` words of K. a_row: from one row to the next, in bytes; panel: from
// one panel to the next, in words; out_row: in elements.
template <class Dot, int kRows, int kVectors>
void multiply_tile(const char* a, int64_t a_row, const int32_t* b, int64_t panel, int64_t words, int32_t* out,
                   int64_t out_row) {
  vi sum[kRows][kVectors] = {};
  const char* rows[(kRows + 2) / 3];  // few address registers: three rows to each
  for (int r = 0; r < kRows; r += 3) rows[r / 3] = a + r * a_row;
  for (int64_t g = 0; g < words; ++g) {
    vi v[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) v[j] = load(b + j * panel + g * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vi word = set1(load_word(rows[r / 3] + r % 3 * a_row + 4 * g));
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[r][j] = Dot::add(sum[r][j], v[j], word);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) store(out + r * out_row + j * kLanes, Dot::finish(sum[r][j]));
  }
}

// As many words as A has; B likewise, or more.
struct Left {
  const char* data;
  int64_t row;  // bytes from one row to the next
};
struct Right {
  const int32_t* data;
  int64_t panel;  // words from one panel to the next
};

// out [rows][panels * kLanes].
template <class Dot>
void multiply(Left a, Right b, int64_t words, int rows, int panels, int32_t* out, int64_t out_row) {
  const int tiles = (rows + kTileRows - 1) / kTileRows,
            height = (rows + tiles - 1) / tiles;  // of about the same height
  for (int j = 0; j < panels; j += kTileVectors) {
    for (int r = 0; r < rows; r += height) {
      with_constant<kTileVectors>(panels - j, [&](auto vectors) {
        with_constant<kTileRows>(std::min(height, rows - r), [&](auto n) {
          multiply_tile<Dot, n, vectors>(a.data + r * a.row, a.row, b.data + j * b.panel, b.panel, words,
                                         out + r * out_row + j * kLanes, out_row);
        });
      });
    }
  }
}

#if defined(EFFVIT_HAS_INT8_DOT) && defined(EFFVIT_HAS_TILES)
#if defined(EFFVIT_HAS_EMULATED_TILES)
inline void emulated_unsigned_dot(int c, int a, int b) {
  TileState& s = tile_state();
  for (int m = 0; m < 16; ++m) {
    vi acc, w;
    std::memcpy(&acc, s.rows[c][m], 64);
    for (int k = 0; k < 16; ++k) {
      std::memcpy(&w, s.rows[b][k], 64);
      acc = dot_bytes(acc, set1(load_word(s.rows[a][m] + 4 * k)), w);
    }
    std::memcpy(s.rows[c][m], &acc, 64);
  }
}
#define EFFVIT_TILE_DOT_UNSIGNED(c, a, b) emulated_unsigned_dot(c, a, b)
#else
#define EFFVIT_TILE_DOT_UNSIGNED(c, a, b) _tile_dpbusd(c, a, b)
#endif

template <class Dot, int kM, int kN>
void multiply_tiles(Left a, Right b, int64_t words, int32_t* out, int64_t out_row) {
  before_tile_loads();
  EFFVIT_TILE_ZERO(0);
  EFFVIT_TILE_ZERO(1);
  EFFVIT_TILE_ZERO(2);
  EFFVIT_TILE_ZERO(3);
  for (int64_t g = 0; g < words; g += 16) {
    EFFVIT_TILE_LOAD(4, a.data + 4 * g, a.row);
    EFFVIT_TILE_LOAD(6, b.data + 16 * g, 64);
    if constexpr (kN == 2) EFFVIT_TILE_LOAD(7, b.data + b.panel + 16 * g, 64);
    if constexpr (kM == 2) EFFVIT_TILE_LOAD(5, a.data + 16 * a.row + 4 * g, a.row);
    if constexpr (std::is_same_v<Dot, SignedRows>) {
      EFFVIT_TILE_DOT_BYTES(0, 4, 6);
      if constexpr (kN == 2) EFFVIT_TILE_DOT_BYTES(1, 4, 7);
      if constexpr (kM == 2) EFFVIT_TILE_DOT_BYTES(2, 5, 6);
      if constexpr (kM * kN == 4) EFFVIT_TILE_DOT_BYTES(3, 5, 7);
    } else {
      EFFVIT_TILE_DOT_UNSIGNED(0, 4, 6);
      if constexpr (kN == 2) EFFVIT_TILE_DOT_UNSIGNED(1, 4, 7);
      if constexpr (kM == 2) EFFVIT_TILE_DOT_UNSIGNED(2, 5, 6);
      if constexpr (kM * kN == 4) EFFVIT_TILE_DOT_UNSIGNED(3, 5, 7);
    }
  }
  const int64_t bytes = 4 * out_row;
  EFFVIT_TILE_STORE(0, out, bytes);
  if constexpr (kN == 2) EFFVIT_TILE_STORE(1, out + 16, bytes);
  if constexpr (kM == 2) EFFVIT_TILE_STORE(2, out + 16 * out_row, bytes);
  if constexpr (kM * kN == 4) EFFVIT_TILE_STORE(3, out + 16 * out_row + 16, bytes);
}

// On tiles: rows of A and of out up to a multiple of 16 can be touched, words are a multiple of 16.
template <class Dot>
void multiply_on_tiles(Left a, Right b, int64_t words, int rows, int panels, int32_t* out, int64_t out_row) {
  for (int j = 0; j < panels; j += 2) {
    for (int r = 0; r < rows; r += 32) {
      const Left from = {a.data + r * a.row, a.row};
      const Right with = {b.data + j * b.panel, b.panel};
      int32_t* const to = out + r * out_row + j * 16;
      if (rows - r > 16) {
        panels - j > 1 ? multiply_tiles<Dot, 2, 2>(from, with, words, to, out_row)
                       : multiply_tiles<Dot, 2, 1>(from, with, words, to, out_row);
      } else {
        panels - j > 1 ? multiply_tiles<Dot, 1, 2>(from, with, words, to, out_row)
                       : multiply_tiles<Dot, 1, 1>(from, with, words, to, out_row);
      }
    }
  }
}
constexpr int kRowsTogether = 16, kWordsTogether = 16;
using ProductTiles = TileScope;
#else
constexpr int kRowsTogether = 1, kWordsTogether = 1;  // A and B have zeros up to these
struct ProductTiles {};
template <class Dot>
void multiply_on_tiles(Left a, Right b, int64_t words, int rows, int panels, int32_t* out, int64_t out_row) {
  multiply<Dot>(a, b, words, rows, panels, out, out_row);
}
#endif

// ---- packing -------------------------------------------------------------------------------------------------------

// Words of four bytes as two words of int16, of bytes with a sign or without.
template <bool kSigned>
EFFVIT_INLINE vi low_pair(vi x) {
  if constexpr (kSigned) return (((x << 24) >> 24) & 0xffff) | (((x << 16) >> 8) & static_cast<int32_t>(0xffff0000));
  return (x & 0xff) | ((x & 0xff00) << 8);
}
template <bool kSigned>
EFFVIT_INLINE vi high_pair(vi x) {
  return low_pair<kSigned>((vi)((vu)x >> 16));
}

// sink(panel, word, x): x has that word of kLanes rows of `bytes` bytes each, which become columns of B; zeros beyond.
template <class Sink>
EFFVIT_INLINE void words_of_rows(const char* from, int64_t row, int64_t rows, int64_t bytes, const Sink& sink) {
  const int64_t whole = bytes / 4, rest = bytes % 4;
  for (int64_t first = 0; first < rows; first += kLanes) {
    const char* const at = from + first * row;
    const int count = static_cast<int>(std::min<int64_t>(kLanes, rows - first));
    int64_t g = 0;
    if (count == kLanes) {
      for (; g + kLanes <= whole; g += kLanes) {
        vf x[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) std::memcpy(&x[i], at + i * row + 4 * g, sizeof(vf));
        transpose_block(x);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) sink(first / kLanes, g + i, (vi)x[i]);
      }
    }
    for (; 4 * g < bytes; ++g) {
      alignas(64) int32_t some[kLanes] = {};
      for (int i = 0; i < count; ++i)
        some[i] =
            g < whole ? load_word(at + i * row + 4 * g) : load_bytes(at + i * row + 4 * g, static_cast<int>(rest));
      sink(first / kLanes, g, load(some));
    }
  }
}

// sink(panel, word, x): x has words of two or four rows of B itself, of `columns` numbers each; zeros beyond.
template <int kTogether, class T, class Sink>
EFFVIT_INLINE void words_of_columns(const T* from, int64_t row, int64_t rows, int64_t columns, const Sink& sink) {
  constexpr int kBits = 32 / kTogether, kMask = kTogether == 4 ? 0xff : 0xffff;
  for (int64_t k = 0; k < rows; k += kTogether) {
    const T* const at = from + k * row;
    const int count = static_cast<int>(std::min<int64_t>(kTogether, rows - k));
    int64_t c = 0;
    if (count == kTogether) {
      for (; c + kLanes <= columns; c += kLanes) {
        vi x = load_integers(at + c) & kMask;
#pragma GCC unroll 4
        for (int i = 1; i < kTogether; ++i) x |= (load_integers(at + i * row + c) & kMask) << (kBits * i);
        sink(c / kLanes, k / kTogether, x);
      }
    }
    for (; c < columns; c += kLanes) {
      vi x{};
      for (int i = 0; i < count; ++i) x |= (load_first(at + i * row + c, columns - c) & kMask) << (kBits * i);
      sink(c / kLanes, k / kTogether, x);
    }
  }
}

// n numbers as int16, zeros up to `width`.
template <class T>
EFFVIT_INLINE void widen(const T* from, int64_t n, int16_t* to, int64_t width) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<int16_t>(from[i]);
  std::memset(to + n, 0, static_cast<size_t>(width - n) * 2);
}

}  // namespace int_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
