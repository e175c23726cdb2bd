// Vectors of bytes for kernels on bits and tables: lookups of 16 entries, transposes. Included by a kernel, inside the
// target region of its ISA.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {

constexpr int kBytes = 4 * kLanes;
typedef uint8_t vb __attribute__((vector_size(4 * EFFVIT_LANES)));
typedef uint8_t vb_unaligned __attribute__((vector_size(4 * EFFVIT_LANES), aligned(1), may_alias));
typedef uint8_t v16 __attribute__((vector_size(16)));
typedef uint8_t v16_unaligned __attribute__((vector_size(16), aligned(1), may_alias));

EFFVIT_INLINE vb load_vb(const uint8_t* p) { return *reinterpret_cast<const vb_unaligned*>(p); }
EFFVIT_INLINE void store_vb(uint8_t* p, vb v) { *reinterpret_cast<vb_unaligned*>(p) = v; }

EFFVIT_INLINE vb set_bytes(uint8_t x) {
#if defined(EFFVIT_HAS_AVX512)
  return (vb)_mm512_set1_epi8(static_cast<char>(x));
#elif defined(EFFVIT_HAS_AVX2)
  return (vb)_mm256_set1_epi8(static_cast<char>(x));
#else
  return vb{} + x;
#endif
}

// 16 bytes, as often as they fit.
EFFVIT_INLINE vb broadcast_16(const uint8_t* p) {
#if defined(EFFVIT_HAS_AVX512)
  return (vb)_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(EFFVIT_HAS_AVX2)
  return (vb)_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vb v;
  for (int i = 0; i < kBytes; i += 16) std::memcpy(reinterpret_cast<char*>(&v) + i, p, 16);
  return v;
#endif
}

// In every byte, table[index % 16] of the 16 bytes of `table` around it; 0 where the index is 128 or more.
EFFVIT_INLINE vb look_up_16(vb table, vb index) {
#if defined(EFFVIT_HAS_AVX512)
  return (vb)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
#elif defined(EFFVIT_HAS_AVX2)
  return (vb)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#else
  uint8_t t[kBytes], x[kBytes];
  std::memcpy(t, &table, sizeof(t)), std::memcpy(x, &index, sizeof(x));
  for (int i = 0; i < kBytes; ++i) x[i] = x[i] & 128 ? 0 : t[i / 16 * 16 + x[i] % 16];
  std::memcpy(&index, x, sizeof(x));
  return index;
#endif
}

// Upper halves of bytes.
EFFVIT_INLINE vb high_nibbles(vb x) {
#if defined(EFFVIT_HAS_AVX512)
  return (vb)_mm512_srli_epi16((__m512i)x, 4) & set_bytes(15);
#elif defined(EFFVIT_HAS_AVX2)
  return (vb)_mm256_srli_epi16((__m256i)x, 4) & set_bytes(15);
#else
  return x >> 4;
#endif
}

// 16 vectors of 16 bytes, transposed: four perfect shuffles.
EFFVIT_INLINE void transpose_16(v16 (&x)[16]) {
  v16 y[16];
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = __builtin_shufflevector(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      y[2 * i + 1] =
          __builtin_shufflevector(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
}

// Rows of a [N, V] matrix of bytes, `stride` apart, as block `block` of [ceil(N / kBlock)][V][kBlock] bytes: a vector
// is one byte of as many rows. Zeros beyond N. The bits of a row's last byte that are not in `last` are cleared.
template <int kBlock>
void pack_transposed(uint8_t* to, const uint8_t* rows, int64_t stride, int64_t N, int64_t V, int64_t block,
                     uint8_t last = 255) {
  for (int c = 0; c < kBlock; c += 16) {
    const int64_t first = block * kBlock + c;
    const uint8_t* const from = rows + first * stride;
    const int count = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(16, N - first)));
    for (int64_t b = 0; b < V; b += 16) {
      const int bytes = static_cast<int>(std::min<int64_t>(16, V - b));
      v16 x[16];
      if (count == 16 && bytes == 16) {
        for (int i = 0; i < 16; ++i) x[i] = *reinterpret_cast<const v16_unaligned*>(from + i * stride + b);
      } else {
        std::memset(x, 0, sizeof(x));
        for (int i = 0; i < count; ++i) std::memcpy(&x[i], from + i * stride + b, static_cast<size_t>(bytes));
      }
      transpose_16(x);
      if (b + bytes == V) x[bytes - 1] &= last;
      for (int i = 0; i < bytes; ++i) std::memcpy(to + (block * V + b + i) * kBlock + c, &x[i], 16);
    }
  }
}

}  // namespace effvit::cpu::EFFVIT_ISA_NAME
