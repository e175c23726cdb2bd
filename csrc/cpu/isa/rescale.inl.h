// Integers in steps of another scale, z m / 2^c to the nearest, ties to even, on vectors: what rows and products of
// integers share. Products have 64 bits; most of what follows them is done in the high 32, exactly.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {

typedef int64_t vl __attribute__((vector_size(4 * EFFVIT_LANES)));
typedef uint64_t vul __attribute__((vector_size(4 * EFFVIT_LANES)));

template <class V>
EFFVIT_INLINE V splat(uint32_t x) {
  if constexpr (std::is_integral_v<V>) {
    return static_cast<V>(x);
  } else {
    return (V)set1(static_cast<int32_t>(x));
  }
}
EFFVIT_INLINE vi select(vi mask, vi a, vi b) { return mask ? a : b; }
EFFVIT_INLINE vu select(vi mask, vu a, vu b) { return mask ? a : b; }

#if defined(EFFVIT_HAS_AVX512)
EFFVIT_INLINE vi least(vi a, vi b) { return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b); }
EFFVIT_INLINE vu least(vu a, vu b) { return (vu)_mm512_min_epu32((__m512i)a, (__m512i)b); }
EFFVIT_INLINE vi most(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
#elif defined(EFFVIT_HAS_AVX2)
EFFVIT_INLINE vi least(vi a, vi b) { return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b); }
EFFVIT_INLINE vu least(vu a, vu b) { return (vu)_mm256_min_epu32((__m256i)a, (__m256i)b); }
EFFVIT_INLINE vi most(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
#else
EFFVIT_INLINE vi least(vi a, vi b) { return a < b ? a : b; }
EFFVIT_INLINE vu least(vu a, vu b) { return a < b ? a : b; }
EFFVIT_INLINE vi most(vi a, vi b) { return a > b ? a : b; }
#endif

EFFVIT_INLINE bool any(vi mask) {
#if defined(EFFVIT_HAS_AVX512)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(EFFVIT_HAS_AVX2)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
}

// Products of the even lanes, in 64 bits.
EFFVIT_INLINE vl mul_even(vi a, vi b) {
#if defined(EFFVIT_HAS_AVX512)
  return (vl)_mm512_mul_epi32((__m512i)a, (__m512i)b);
#elif defined(EFFVIT_HAS_AVX2)
  return (vl)_mm256_mul_epi32((__m256i)a, (__m256i)b);
#else
  return (((vl)a << 32) >> 32) * (((vl)b << 32) >> 32);
#endif
}
EFFVIT_INLINE vul mul_even(vu a, vu b) {
#if defined(EFFVIT_HAS_AVX512)
  return (vul)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(EFFVIT_HAS_AVX2)
  return (vul)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return ((vul)a & 0xffffffffu) * ((vul)b & 0xffffffffu);
#endif
}
EFFVIT_INLINE vu mul_high(vu a, uint32_t b) {
  const vu m = (vu)set1(static_cast<int32_t>(b));
  const vul even = mul_even(a, m) >> 32, odd = mul_even((vu)((vul)a >> 32), m);
  return (vu)(even | (odd & ~uint64_t{0xffffffff}));
}
EFFVIT_INLINE vi odd_lanes(vi x) { return (vi)((vul)x >> 32); }

// The low halves of both, in turn.
EFFVIT_INLINE vi interleave(vul even, vul odd) {
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, _MM_PERM_CCAA);
#elif defined(EFFVIT_HAS_AVX2)
  return (vi)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa);
#else
  return (vi)((even & 0xffffffffu) | (odd << 32));
#endif
}
// The high halves of both, in turn.
EFFVIT_INLINE vi high_halves(vl even, vl odd) {
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_mask_shuffle_epi32((__m512i)odd, 0x5555, (__m512i)even, _MM_PERM_DDBB);
#elif defined(EFFVIT_HAS_AVX2)
  return (vi)_mm256_blend_epi32((__m256i)((vul)even >> 32), (__m256i)odd, 0xaa);
#else
  return (vi)(((vul)even >> 32) | ((vul)odd & ~uint64_t{0xffffffff}));
#endif
}

// t / 2^c in 64 bits to the nearest, ties to even; 1 <= c <= 61, |t| <= 2^62.
EFFVIT_INLINE vl rounded_shift(vl t, vul c) {
  const vul half = (~vul{} >> 1u) >> (64u - c);  // of 2^c, less one
#if defined(EFFVIT_HAS_AVX512)
  return (t + (vl)half + ((t >> (vl)c) & 1)) >> (vl)c;
#else  // no arithmetic shift: an even multiple of 2^c makes t positive
  const vul offset = vul{} + (uint64_t{1} << 62), u = (vul)t + offset;
  return (vl)(((u + half + ((u >> c) & 1u)) >> c) - (offset >> c));
#endif
}
EFFVIT_INLINE vl between(vl x, int32_t low, int32_t high) {
  const vl a = vl{} + low, b = vl{} + high;
#if defined(EFFVIT_HAS_AVX512)
  return (vl)_mm512_min_epi64(_mm512_max_epi64((__m512i)x, (__m512i)a), (__m512i)b);
#else
  x = x < a ? a : x;
  return x > b ? b : x;
#endif
}
EFFVIT_INLINE vi between(vl even, vl odd, int32_t low, int32_t high) {
  return interleave((vul)between(even, low, high), (vul)between(odd, low, high));
}
EFFVIT_INLINE vl rescaled_even(vi z, vi m, vi c) { return rounded_shift(mul_even(z, m), (vul)c & 0xffffffffu); }
EFFVIT_INLINE vl rescaled_odd(vi z, vi m, vi c) {
  return rounded_shift(mul_even(odd_lanes(z), odd_lanes(m)), (vul)c >> 32);
}

// From c = 33 on, in 32 bits. With p = z m, h its high half and r = 2^(c - 33), floor((p + 2^(c-1)) / 2^c) is (h + r)
// >> (c - 32), as 2^(c-1) has no low half; and floor((p + 2^(c-1) - 1) / 2^c) the same of h - 1 where the low half of p
// is 0. They differ where p is half way between two results, and there the even one is right. |h| <= 2^30, r <= 2^28.
EFFVIT_INLINE vi rounded_up(vi h, vi r, vi right) { return (h + r) >> right; }
EFFVIT_INLINE vi rounded_even(vi h, vi low, vi r, vi right) {
  const vi up = (h + r) >> right, down = (h + r + (low == 0)) >> right;
  return up - ((up - down) & up);
}

EFFVIT_INLINE vi rescale(vi z, vi m, vi c, int32_t low, int32_t high) {
  if (!any(c < 33)) {
    const vl even = mul_even(z, m), odd = mul_even(odd_lanes(z), odd_lanes(m));
    const vi right = c - 32;
    const vi y = rounded_even(high_halves(even, odd), interleave((vul)even, (vul)odd), set1(1) << (right - 1), right);
    return least(most(y, set1(low)), set1(high));
  }
  return between(rescaled_even(z, m, c), rescaled_odd(z, m, c), low, high);
}
EFFVIT_INLINE vi rescale_sum(vi z, vi m, vi c, vi z2, vi m2, vi c2, int32_t low, int32_t high) {
  return between(rescaled_even(z, m, c) + rescaled_even(z2, m2, c2), rescaled_odd(z, m, c) + rescaled_odd(z2, m2, c2),
                 low, high);
}
EFFVIT_INLINE vi product(vi a, vi b, int32_t low, int32_t high) {
  return between(mul_even(a, b), mul_even(odd_lanes(a), odd_lanes(b)), low, high);
}

// int32 of kLanes smaller integers.
EFFVIT_INLINE vi load_integers(const int32_t* p) { return load(p); }
EFFVIT_INLINE vi load_integers(const int16_t* p) {
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(EFFVIT_HAS_AVX2)
  return (vi)_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vi x;
  for (int i = 0; i < kLanes; ++i) x[i] = p[i];
  return x;
#endif
}
EFFVIT_INLINE vi load_integers(const int8_t* p) {
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(EFFVIT_HAS_AVX2)
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  vi x;
  for (int i = 0; i < kLanes; ++i) x[i] = p[i];
  return x;
#endif
}
EFFVIT_INLINE vi load_integers(const uint8_t* p) {
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(EFFVIT_HAS_AVX2)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  vi x;
  for (int i = 0; i < kLanes; ++i) x[i] = p[i];
  return x;
#endif
}

}  // namespace effvit::cpu::EFFVIT_ISA_NAME
