// Products of bfloat16 operands with float32 sums, where the ISA has them: AMX tiles, or AVX512-BF16's dot products of
// pairs on vectors; and the repacking these need. Emulated ISAs run the same code on ordinary instructions, so that
// every machine tests it.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {

#if defined(EFFVIT_HAS_BF16_PRODUCTS)
template <class T>
constexpr bool kBf16Products = std::is_same_v<T, BFloat16>;  // operands are rounded to bfloat16, as torch's are
#else
template <class T>
constexpr bool kBf16Products = false;
#endif
#if defined(EFFVIT_HAS_TILES)
template <class T>
constexpr bool kBf16Tiles = kBf16Products<T>;  // on tiles, whose results go through memory
#else
template <class T>
constexpr bool kBf16Tiles = false;
#endif
// Element type of the operands of T's products.
template <class T>
using Operand = std::conditional_t<kBf16Products<T>, BFloat16, float>;

// The tile configuration of the thread, owned while a pass runs on tiles.
struct NoTiles {};

#if defined(EFFVIT_HAS_BF16_PRODUCTS)
static_assert(kLanes == 16, "a row of a float32 tile is one vector");

// A product is C[m, n] (+)= A[m, k] B[k, n], C in float32, by the same gemm_into as in float32; n is a multiple of 16.
//   right(b, n)       B with its rows interleaved in pairs ("VNNI": b[k/2][n][k%2])
//   row_major(a, ld)  A row by row, `ld` elements apart
//   transposed(a, m)  A from its transpose, whose rows are interleaved in pairs as those of B are; k is kBf16MaxRows at
//                     most
// k is rounded up to kBf16Depth: B has rows of zeros there, and A finite numbers. A is readable up to a multiple of 16
// rows.
constexpr int kBf16MaxRows = 64;

// acc + a.low * b.low + a.high * b.high in every lane; lanes of a and b are pairs of bfloat16.
EFFVIT_INLINE vf dot_pairs(vf a, vf b, vf acc) {
#if defined(EFFVIT_HAS_AVX512_BF16)
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  const vi high = vi{} - 65536;
  acc = fma((vf)((vi)a << 16), (vf)((vi)b << 16), acc);
  return fma((vf)((vi)a & high), (vf)((vi)b & high), acc);
#endif
}

#if defined(EFFVIT_HAS_TILES)
constexpr int kBf16Depth = 32;

// A tile is 16 rows of 64 bytes: 16x32 bfloat16 of A; 16 pairs of rows of B, interleaved ("VNNI": b[k/2][n][k%2]);
// 16x16 float32 of C.
#if defined(EFFVIT_HAS_EMULATED_TILES)
struct TileState {
  unsigned char rows[8][16][64];
};
inline TileState& tile_state() {
  static thread_local TileState state;
  return state;
}
#define EFFVIT_TILE_ZERO(t) std::memset(tile_state().rows[t], 0, 1024)
#define EFFVIT_TILE_LOAD(t, p, bytes) \
  for (int r_ = 0; r_ < 16; ++r_)     \
  std::memcpy(tile_state().rows[t][r_], reinterpret_cast<const char*>(p) + r_ * (bytes), 64)
#define EFFVIT_TILE_STORE(t, p, bytes) \
  for (int r_ = 0; r_ < 16; ++r_) std::memcpy(reinterpret_cast<char*>(p) + r_ * (bytes), tile_state().rows[t][r_], 64)
#define EFFVIT_TILE_DOT(c, a, b) emulated_dot(c, a, b)
inline void emulated_dot(int c, int a, int b) {
  TileState& s = tile_state();
  for (int m = 0; m < 16; ++m) {
    float acc[16];
    std::memcpy(acc, s.rows[c][m], 64);
    for (int k = 0; k < 16; ++k) {
      BFloat16 x[2], y[2];
      std::memcpy(x, s.rows[a][m] + 4 * k, 4);
      for (int n = 0; n < 16; ++n) {
        std::memcpy(y, s.rows[b][k] + 4 * n, 4);
        acc[n] += to_float(x[0]) * to_float(y[0]) + to_float(x[1]) * to_float(y[1]);
      }
    }
    std::memcpy(s.rows[c][m], acc, 64);
  }
}
#else
#define EFFVIT_TILE_ZERO(t) _tile_zero(t)
#define EFFVIT_TILE_LOAD(t, p, bytes) _tile_loadd(t, p, bytes)
#define EFFVIT_TILE_STORE(t, p, bytes) _tile_stored(t, p, bytes)
#define EFFVIT_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#endif
// Before tiles are loaded: to the compiler a load of a tile touches no memory, so that it might put stores after it.
EFFVIT_INLINE void before_tile_loads() { asm volatile("" ::: "memory"); }

// Configures the eight tiles of this thread as full 16 x 64 byte tiles while it lives.
class TileScope {
 public:
  TileScope() {
#if !defined(EFFVIT_HAS_EMULATED_TILES)
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" : : "m"(config) : "memory");  // the intrinsic reads its first 8 bytes, it says
    _tile_loadconfig(&config);
#endif
  }
  ~TileScope() {
#if !defined(EFFVIT_HAS_EMULATED_TILES)
    _tile_release();
#endif
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};
template <class T>
using ProductScope = std::conditional_t<kBf16Tiles<T>, TileScope, NoTiles>;

struct RowMajorTiles {
  const BFloat16* data;
  int64_t ld;
};
struct TransposedTiles {  // word [t * ld + r] is elements 2 t and 2 t + 1 of row r
  const Word* data;
  int64_t ld;
};
struct TilesB {
  const BFloat16* data;
  int64_t ld;  // from one pair of rows to the next
};
EFFVIT_INLINE RowMajorTiles row_major(const BFloat16* a, int64_t ld) { return {a, ld}; }
EFFVIT_INLINE TransposedTiles transposed(const BFloat16* a, int64_t m) { return {reinterpret_cast<const Word*>(a), m}; }
EFFVIT_INLINE TilesB right(const BFloat16* b, int64_t n) { return {b, 2 * n}; }

// kM x kN tiles of C, at most 2 x 2: each tile of A and B is then used twice.
template <int kM, int kN>
inline void multiply_tiles(int k, RowMajorTiles a, const BFloat16* b, int64_t ldb, float* c, int64_t ldc,
                           bool accumulate) {
  const int64_t a_bytes = a.ld * 2, b_bytes = ldb * 2, c_bytes = ldc * 4;
  float* const c1 = c + 16 * ldc;
  before_tile_loads();
  if (accumulate) {
    EFFVIT_TILE_LOAD(0, c, c_bytes);
    if constexpr (kN == 2) EFFVIT_TILE_LOAD(1, c + 16, c_bytes);
    if constexpr (kM == 2) EFFVIT_TILE_LOAD(2, c1, c_bytes);
    if constexpr (kM * kN == 4) EFFVIT_TILE_LOAD(3, c1 + 16, c_bytes);
  } else {
    EFFVIT_TILE_ZERO(0);
    EFFVIT_TILE_ZERO(1);
    EFFVIT_TILE_ZERO(2);
    EFFVIT_TILE_ZERO(3);
  }
  for (int t = 0; t < k; t += 32) {
    EFFVIT_TILE_LOAD(4, a.data + t, a_bytes);
    EFFVIT_TILE_LOAD(6, b + (t / 2) * ldb, b_bytes);
    if constexpr (kN == 2) EFFVIT_TILE_LOAD(7, b + (t / 2) * ldb + 32, b_bytes);
    if constexpr (kM == 2) EFFVIT_TILE_LOAD(5, a.data + 16 * a.ld + t, a_bytes);
    EFFVIT_TILE_DOT(0, 4, 6);
    if constexpr (kN == 2) EFFVIT_TILE_DOT(1, 4, 7);
    if constexpr (kM == 2) EFFVIT_TILE_DOT(2, 5, 6);
    if constexpr (kM * kN == 4) EFFVIT_TILE_DOT(3, 5, 7);
  }
  EFFVIT_TILE_STORE(0, c, c_bytes);
  if constexpr (kN == 2) EFFVIT_TILE_STORE(1, c + 16, c_bytes);
  if constexpr (kM == 2) EFFVIT_TILE_STORE(2, c1, c_bytes);
  if constexpr (kM * kN == 4) EFFVIT_TILE_STORE(3, c1 + 16, c_bytes);
}

// Rows [row, row + rows) of C, at most 32 of them, from as many rows of A. Whole tiles go to C itself where C is
// memory; all else goes through a block in the L1 cache.
template <class C>
inline void tile_rows(int row, int rows, int n, int k, RowMajorTiles a, TilesB b, C sink) {
  constexpr bool kMemory = std::is_same_v<C, StoreC>;
  alignas(64) float block[32 * 32];
  k = round_up(k, kBf16Depth);
  for (int j = 0; j < n; j += 32) {
    const int columns = std::min(32, n - j);
    float* c = block;
    int64_t ldc = 32;
    bool accumulate = false;
    if constexpr (kMemory) {
      float* const to = sink.data + row * sink.ld + j;
      accumulate = sink.accumulate;
      if (rows % 16 == 0) {
        c = to;
        ldc = sink.ld;
      } else if (accumulate) {
        for (int r = 0; r < rows; ++r) std::memcpy(block + 32 * r, to + r * sink.ld, columns * sizeof(float));
      }
    }
    const BFloat16* const from = b.data + 2 * j;
    if (rows > 16) {
      columns > 16 ? multiply_tiles<2, 2>(k, a, from, b.ld, c, ldc, accumulate)
                   : multiply_tiles<2, 1>(k, a, from, b.ld, c, ldc, accumulate);
    } else {
      columns > 16 ? multiply_tiles<1, 2>(k, a, from, b.ld, c, ldc, accumulate)
                   : multiply_tiles<1, 1>(k, a, from, b.ld, c, ldc, accumulate);
    }
    if (c != block) continue;
    if constexpr (kMemory) sink.accumulate = false;
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < columns; i += kLanes) sink(row + r, j + i, load(block + 32 * r + i));
    }
    if constexpr (kMemory) sink.accumulate = accumulate;
  }
}

// Calls f(row, rows) for every 32 rows, and what is to be fetched meanwhile before it.
template <class F, class Rows>
EFFVIT_INLINE void blocks_of_rows(int m, int n, const F& ahead, const Rows& f) {
  for (int i = 0, made = 0; i < m; i += 32) {
    const int rows = std::min(32, m - i);
    for (; made < gemm_steps(i + rows, n); ++made) {
      if (const Fetch fetch = ahead(1); fetch.data) fetch(0);
    }
    f(i, rows);
  }
}

template <class C, class F>
inline void gemm_into(int m, int n, int k, RowMajorTiles a, TilesB b, C sink, const F& ahead) {
  blocks_of_rows(m, n, ahead,
                 [&](int i, int rows) { tile_rows(i, rows, n, k, RowMajorTiles{a.data + i * a.ld, a.ld}, b, sink); });
}
template <class C, class F>
inline void gemm_into(int m, int n, int k, TransposedTiles a, TilesB b, C sink, const F& ahead) {
  alignas(64) Word left[32 * kBf16MaxRows / 2];
  const int words = round_up(k, kBf16Depth) / 2, there = (k + 1) / 2;
  blocks_of_rows(m, n, ahead, [&](int i, int rows) {
    for (int r = 0; r < rows; r += kLanes) {
      for (int t = 0; t < words; t += kLanes) {
        vf x[kLanes];
#pragma GCC unroll 16
        for (int s = 0; s < kLanes; ++s) x[s] = t + s < there ? load(a.data + (t + s) * a.ld + i + r) : vf{};
        transpose_block(x);
#pragma GCC unroll 16
        for (int s = 0; s < kLanes; ++s) store(left + (r + s) * words + t, x[s]);
      }
    }
    const BFloat16* const data = reinterpret_cast<const BFloat16*>(left);
    tile_rows(i, rows, n, k, RowMajorTiles{data, 2 * words}, b, sink);
  });
}

#else

constexpr int kBf16Depth = 2;
template <class T>
using ProductScope = NoTiles;

// table[at % 16] in every lane.
EFFVIT_INLINE vi look_up(vi table, vi at) {
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_permutexvar_epi32((__m512i)at, (__m512i)table);
#else
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = table[at[i] & 15];
  return v;
#endif
}

// An operand of the float32 GEMM whose words are pairs of bfloat16: a dot product takes the place of a multiply-add.
template <class A>
struct PairsOf : A {
  EFFVIT_INLINE static vf multiply_add(vf a, vf b, vf c) { return dot_pairs(a, b, c); }
  EFFVIT_INLINE static int steps(int k) { return (k + 1) / 2; }
  EFFVIT_INLINE PairsOf rows_from(int r) const { return {A::rows_from(r)}; }
};
EFFVIT_INLINE const Word* words(const BFloat16* p) { return reinterpret_cast<const Word*>(p); }
EFFVIT_INLINE PairsOf<RowMajorA> row_major(const BFloat16* a, int64_t ld) { return {{words(a), ld / 2}}; }
EFFVIT_INLINE PairsOf<TransposedA> transposed(const BFloat16* a, int64_t m) { return {{words(a), m}}; }
EFFVIT_INLINE DenseB right(const BFloat16* b, int64_t n) { return {words(b), n}; }

#endif  // EFFVIT_HAS_TILES

// ---- repacking -----------------------------------------------------------------------------------------------------

// dst[i * ld] = row(i), `width` elements and zeros up to ld, for n rows.
template <class Row>
EFFVIT_INLINE void copy_rows(BFloat16* dst, int ld, int n, int width, const Row& row) {
  if (width == 32 && ld == 32) {
    for (int i = 0; i < n; ++i) std::memcpy(dst + i * 32, row(i), 64);
  } else if (width == ld && width % 32 == 0) {
    for (int i = 0; i < n; ++i) {
      const BFloat16* from = row(i);
      for (int c = 0; c < width; c += 32) std::memcpy(dst + int64_t{i} * ld + c, from + c, 64);
    }
  } else {
    for (int i = 0; i < n; ++i) {
      BFloat16* to = dst + int64_t{i} * ld;
      std::memcpy(to, row(i), static_cast<size_t>(width) * 2);
      std::memset(to + width, 0, static_cast<size_t>(ld - width) * 2);
    }
  }
}

// dst[k/2][n][k%2] = row(n)[k]: B = transpose of the rows, for rows of bfloat16 as they lie in memory. A pair of
// neighbouring elements is one 32-bit word, so this is a transpose of words. rows are readable up to round_up(k, 32);
// columns n..round_up(n, 16) become zero, ldb counts elements.
template <class Row>
EFFVIT_INLINE void pack_transposed(BFloat16* dst, int64_t ldb, int n, int k, const Row& row) {
  for (int j = 0; j < n; j += kLanes) {
    for (int t = 0; t < k; t += 2 * kLanes) {
      vf r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) r[i] = j + i < n ? load(reinterpret_cast<const float*>(row(j + i) + t)) : vf{};
      transpose_block(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(dst + (t / 2 + i) * ldb + 2 * j), r[i]);
    }
  }
}

// Pairs of numbers that are bfloat16 already, or (round_pairs) are rounded: a low, b high in every lane.
EFFVIT_INLINE vi join_pairs(vf a, vf b) { return (vi)((vu)a >> 16) | ((vi)b & (vi{} - 65536)); }
EFFVIT_INLINE vi load_pairs(const BFloat16* a, const BFloat16* b) {
#if defined(EFFVIT_HAS_AVX512)
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  return (vi)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
  return join_pairs(load(a), load(b));
#endif
}
EFFVIT_INLINE vi round_pairs(vf a, vf b) {
#if defined(EFFVIT_HAS_AVX512_BF16)
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
  return (vi)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
  BFloat16 low[kLanes], high[kLanes];
  store(low, a);
  store(high, b);
  vi pairs;
  for (int i = 0; i < kLanes; ++i) pairs[i] = static_cast<int32_t>(low[i].bits | uint32_t{high[i].bits} << 16);
  return pairs;
#endif
}

// Interleaves two rows of n bfloat16 (n a multiple of 16): dst[2 i + s] = row s [i].
EFFVIT_INLINE void interleave_rows(BFloat16* dst, const BFloat16* even, const BFloat16* odd, int n) {
  int i = 0;
#if defined(EFFVIT_HAS_AVX512)
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (; i + 32 <= n; i += 32) {
    const __m512i a = _mm512_loadu_si512(even + i), b = _mm512_loadu_si512(odd + i);
    _mm512_storeu_si512(dst + 2 * i, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(dst + 2 * i + 32, _mm512_permutex2var_epi16(a, high, b));
  }
#endif
  for (; i < n; i += 16) {
#if defined(EFFVIT_HAS_AVX512)
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even + i)));
    const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd + i)));
    _mm512_storeu_si512(dst + 2 * i, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
#else
    for (int j = i; j < i + 16; ++j) {
      dst[2 * j] = even[j];
      dst[2 * j + 1] = odd[j];
    }
#endif
  }
}

// dst[t/2][n][t%2] = row(t)[n] for t < k, zero up to round_up(k, kBf16Depth); rows readable up to n, a multiple of 16.
template <class Row>
EFFVIT_INLINE void pack_rows(BFloat16* dst, int64_t ldb, int k, int n, const Row& row) {
  static const BFloat16 kZeros[1024] = {};
  for (int t = 0; t < round_up(k, kBf16Depth); t += 2) {
    for (int c = 0; c < n; c += 1024) {
      const int width = n - c < 1024 ? n - c : 1024;
      interleave_rows(dst + (t / 2) * ldb + 2 * c, t < k ? row(t) + c : kZeros, t + 1 < k ? row(t + 1) + c : kZeros,
                      width);
    }
  }
}

#else
template <class T>
using ProductScope = NoTiles;
// Declared, and nowhere defined: what stands under `if constexpr (kBf16Products<T>)` then needs no #if around it.
RowMajorA row_major(const BFloat16* a, int64_t ld);
TransposedA transposed(const BFloat16* a, int64_t m);
DenseB right(const BFloat16* b, int64_t n);
vf dot_pairs(vf a, vf b, vf acc);
vi join_pairs(vf a, vf b);
vi load_pairs(const BFloat16* a, const BFloat16* b);
vi round_pairs(vf a, vf b);
#endif  // EFFVIT_HAS_BF16_PRODUCTS

}  // namespace effvit::cpu::EFFVIT_ISA_NAME
