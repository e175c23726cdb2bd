// int8_attention on the CPU: from scores below their maximum to weights, in 16-bit arithmetic, and their products.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace int8_attention_impl {

// Vectors of twice as many 16-bit integers without a sign.
typedef uint16_t vuh __attribute__((vector_size(4 * EFFVIT_LANES)));

EFFVIT_INLINE vuh set1_halves(int x) { return (vuh)set1(static_cast<int32_t>(static_cast<uint32_t>(x) * 0x10001u)); }

// (a b + 2^14) >> 15, of numbers below 2^15.
EFFVIT_INLINE vuh multiply_high(vuh a, vuh b) {
#if defined(EFFVIT_HAS_AVX512)
  return (vuh)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b);
#elif defined(EFFVIT_HAS_AVX2)
  return (vuh)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b);
#else
  vuh y;
  for (int i = 0; i < 2 * kLanes; ++i) y[i] = static_cast<uint16_t>((int32_t{a[i]} * b[i] + 16384) >> 15);
  return y;
#endif
}

// 128 >> q, q at most 7.
EFFVIT_INLINE vuh power_of(vuh q) {
#if defined(EFFVIT_HAS_AVX512)
  return (vuh)_mm512_srlv_epi16((__m512i)set1_halves(128), (__m512i)q);
#elif defined(EFFVIT_HAS_AVX2)
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(-128, 64, 32, 16, 8, 4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0));
  return (vuh)_mm256_shuffle_epi8(table, (__m256i)(q | set1_halves(0x8000)));  // 0 for the high bytes
#else
  return set1_halves(128) >> q;
#endif
}

// The low halves of a, and of b above them.
EFFVIT_INLINE vuh low_halves(vi a, vi b) {
#if defined(EFFVIT_HAS_AVX512)
  return (vuh)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)a, _mm512_slli_epi32((__m512i)b, 16));
#elif defined(EFFVIT_HAS_AVX2)
  return (vuh)_mm256_blend_epi16((__m256i)a, _mm256_slli_epi32((__m256i)b, 16), 0xaa);
#else
  return (vuh)((a & 0xffff) | (vi)((vu)b << 16));
#endif
}

// The definition's exp2_steps and shiftmax_steps of t steps of 2^-13: 0..127. Both end alike: e is 127 * 2^8 times the
// fraction's power, and (e + (128 << q)) >> (8 + q) is (e * (128 >> q) + 2^14) >> 15.
template <bool kShiftmax>
EFFVIT_INLINE vuh weights_of(vuh t) {
  if constexpr (kShiftmax) {
    const vuh x = t + ((t + 1) >> 1) - ((t + 15) >> 4), f = x & 8191;  // t <= 45589: below 2^16
    return multiply_high(set1_halves(32512) - (f << 1) + (f >> 6), power_of(x >> 13));
  } else {
    const vuh f = (t << 2) & 0x7fff;
    vuh e = set1_halves(7494) - multiply_high(set1_halves(1273), f);
    e = set1_halves(22478) - multiply_high(e, f);
    e = set1_halves(32512) - multiply_high(e, f);
    return multiply_high(e, power_of(t >> 13));
  }
}

// Words of four weights from steps that they are below the maximum, at most kExp2Limit or kShiftmaxLimit. Adding 2^23
// and a half rounds to integers, left in the low halves.
template <bool kShiftmax>
EFFVIT_INLINE vi weights_of(vf y0, vf y1, vf y2, vf y3) {
  const vf magic = set1(12582912.f);
  const vuh even = weights_of<kShiftmax>(low_halves((vi)(y0 + magic), (vi)(y2 + magic)));
  const vuh odd = weights_of<kShiftmax>(low_halves((vi)(y1 + magic), (vi)(y3 + magic)));
  return (vi)(even | (odd << 8));
}

// acc + in every lane the sum of four products, of weights up to 127 and signed bytes: two of these fit 16 bits.
EFFVIT_INLINE vi dot_weights(vi acc, vi weights, vi bytes) {
#if defined(EFFVIT_HAS_INT8_DOT)
  return dot_bytes(acc, weights, bytes);
#elif defined(EFFVIT_HAS_AVX512)
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)weights, (__m512i)bytes);
  return (vi)_mm512_add_epi32((__m512i)acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(EFFVIT_HAS_AVX2) && EFFVIT_LANES == 8
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)weights, (__m256i)bytes);
  return (vi)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  const vh even = (vh)(weights & 0x00ff00ff), odd = (vh)((vi)((vu)weights >> 8) & 0x00ff00ff);
  acc = dot_halves(acc, even, (vh)((vuh)bytes << 8) >> 8);
  return dot_halves(acc, odd, (vh)bytes >> 8);
#endif
}

// acc + the products of a word of queries and one of a key.
EFFVIT_INLINE vi dot_scores(vi acc, vi query, vi key) {
#if defined(EFFVIT_HAS_INT8_DOT)
  return dot_bytes(acc, query, key);
#else
  return dot_halves(acc, (vh)query, (vh)key);
#endif
}

constexpr float kLowest = -3.0e38f;  // a maximum of nothing: finite, so that differences are
constexpr float kLn2 = 0.693147181f;

// Steps below the maximum, cut off at the limit: NaN too.
EFFVIT_INLINE vf below(vf distance, vf step, vf limit) { return min(distance * step, limit); }

// What a query's weights of a block change: the running maximum, and factors of what was summed before and of the
// block.
struct Merge {
  vf maximum, before, block;
};
EFFVIT_INLINE Merge merge(vf maximum, vf of_block) {
  const vf largest = max(maximum, of_block);  // the latter where it is NaN
  const vf top = maximum == maximum ? largest : maximum;
  return {top, exp2(maximum - top), exp2(of_block - top)};
}

EFFVIT_INLINE vf inverse_of_total(vf total) { return total == 0.f ? vf{} : 1.f / total; }
// The natural log-sum-exp, without what a mean adds.
EFFVIT_INLINE vf lse_of(vf maximum, vf total) {
  const vf infinite = set1(-__builtin_inff());
  return total == 0.f ? infinite : fma(maximum, set1(kLn2), log(total / 127.f));
}

}  // namespace int8_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
