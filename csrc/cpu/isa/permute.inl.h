// Permutations by numbers that lie in vectors: what 2:4-sparse products need. Included once per ISA, inside its target
// region.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {

// Bytes of every 128 bits of x by the numbers below 16 in the bytes of `at`.
EFFVIT_INLINE vi shuffle_bytes(vi x, vi at) {
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_shuffle_epi8((__m512i)x, (__m512i)at);
#elif defined(EFFVIT_HAS_AVX2)
  return (vi)_mm256_shuffle_epi8((__m256i)x, (__m256i)at);
#else
  uint8_t from[4 * kLanes], by[4 * kLanes], to[4 * kLanes];
  std::memcpy(from, &x, sizeof(x));
  std::memcpy(by, &at, sizeof(at));
  for (int i = 0; i < 4 * kLanes; ++i) to[i] = from[i / 16 * 16 + by[i]];
  std::memcpy(&x, to, sizeof(x));
  return x;
#endif
}

EFFVIT_INLINE vi broadcast_eight(const void* p) {
  int64_t eight;
  std::memcpy(&eight, p, 8);
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_set1_epi64(eight);
#elif defined(EFFVIT_HAS_AVX2)
  return (vi)_mm256_set1_epi64x(eight);
#else
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<int32_t>(eight >> (i % 2 * 32));
  return v;
#endif
}

EFFVIT_INLINE vf broadcast_four(const float* p) {
#if defined(EFFVIT_HAS_AVX512)
  return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif defined(EFFVIT_HAS_AVX2)
  return (vf)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i % 4];
  return v;
#endif
}

// Words of every 128 bits of x by the two lowest bits of `at`.
EFFVIT_INLINE vf permute_fours(vf x, vi at) {
#if defined(EFFVIT_HAS_AVX512)
  return (vf)_mm512_permutevar_ps((__m512)x, (__m512i)at);
#elif defined(EFFVIT_HAS_AVX2)
  return (vf)_mm256_permutevar_ps((__m256)x, (__m256i)at);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = x[i / 4 * 4 + (at[i] & 3)];
  return v;
#endif
}

// The first lanes of x, in order, in the lanes whose bits of `mask` are set; zeros in the others.
EFFVIT_INLINE vf expand(vf x, uint32_t mask) {
#if defined(EFFVIT_HAS_AVX512)
  return (vf)_mm512_maskz_expand_ps(static_cast<__mmask16>(mask), (__m512)x);
#else
  vf v{};
  for (int i = 0, from = 0; i < kLanes; ++i) {
    if (mask >> i & 1) v[i] = x[from++];
  }
  return v;
#endif
}

}  // namespace effvit::cpu::EFFVIT_ISA_NAME
