// The SIMD layer: vectors of EFFVIT_LANES floats, loads and stores of every element type, exp, transposes, and the
// register-tiled float32 GEMM that the ops share. Included once per ISA, inside its target region.
//
// GCC and clang vector extensions carry the arithmetic, so one source serves 4, 8 and 16 lanes on any machine;
// intrinsics appear only where the compiler would not find the instruction.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {

#define EFFVIT_INLINE inline __attribute__((always_inline))

constexpr int kLanes = EFFVIT_LANES;
typedef float vf __attribute__((vector_size(4 * EFFVIT_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * EFFVIT_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * EFFVIT_LANES)));
typedef float vf_unaligned
    __attribute__((vector_size(4 * EFFVIT_LANES), aligned(2), may_alias));  // or pairs of bfloat16
typedef int32_t vi_unaligned __attribute__((vector_size(4 * EFFVIT_LANES), aligned(4), may_alias));
typedef float Word __attribute__((may_alias));  // a float, or a pair of bfloat16

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

EFFVIT_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
EFFVIT_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
// Past the caches, for what is not read again soon; p lies at a whole vector. stream_fence() before anyone reads it.
EFFVIT_INLINE void stream(float* p, vf v) {
#if defined(EFFVIT_HAS_AVX512)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(EFFVIT_HAS_AVX2)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
EFFVIT_INLINE void stream_fence() {
#if defined(EFFVIT_HAS_AVX512) || defined(EFFVIT_HAS_AVX2)
  _mm_sfence();
#endif
}
EFFVIT_INLINE vi load(const int32_t* p) { return *reinterpret_cast<const vi_unaligned*>(p); }

EFFVIT_INLINE vf set1(float x) {
#if defined(EFFVIT_HAS_AVX512)
  return (vf)_mm512_set1_ps(x);
#elif defined(EFFVIT_HAS_AVX2)
  return (vf)_mm256_set1_ps(x);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = x;
  return v;
#endif
}

// a*b + c; one rounding where the ISA has it (-ffp-contract=fast).
EFFVIT_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }

EFFVIT_INLINE vf max(vf a, vf b) {
#if defined(EFFVIT_HAS_AVX512)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(EFFVIT_HAS_AVX2)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller one; y where either is a NaN, like max.
EFFVIT_INLINE vf min(vf x, vf y) {
#if defined(EFFVIT_HAS_AVX512)
  return (vf)_mm512_min_ps((__m512)x, (__m512)y);
#elif defined(EFFVIT_HAS_AVX2)
  return (vf)_mm256_min_ps((__m256)x, (__m256)y);
#else
  return x < y ? x : y;
#endif
}

EFFVIT_INLINE vf bits_to_float(vi x) { return (vf)x; }
EFFVIT_INLINE vi float_to_bits(vf x) { return (vi)x; }

EFFVIT_INLINE float reduce_max(vf v) {
#if defined(EFFVIT_HAS_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#elif defined(EFFVIT_HAS_AVX2)
  __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = m > v[i] ? m : v[i];
  return m;
#endif
}

EFFVIT_INLINE float reduce_add(vf v) {
#if defined(EFFVIT_HAS_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(EFFVIT_HAS_AVX2)
  __m128 m = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
#else
  float s = 0.f;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
#endif
}

// All bits of lanes i < n, none elsewhere; 0 <= n <= kLanes.
EFFVIT_INLINE vi lanes_below(int n) {
  alignas(64) static const int32_t kMask[2 * 16] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  return load(kMask + 16 - n);
}

// Lanes i < n of x, zero elsewhere.
EFFVIT_INLINE vf first_lanes(vf x, int n) { return (vf)((vi)x & lanes_below(n)); }

// Lanes i < n of x, `other` elsewhere.
EFFVIT_INLINE vf first_lanes_or(vf x, int n, float other) {
  const vi there = lanes_below(n);
  return (vf)(((vi)x & there) | ((vi)set1(other) & ~there));
}

// exp for x <= 88, exactly 0 below the smallest normal result; about 1 ulp. e^x = 2^n e^f, n = round(x/ln 2).
EFFVIT_INLINE vf exp(vf x) {
  const vf magic = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low mantissa bits
  const vf r = fma(x, set1(1.44269504f), magic);
  const vf n = r - magic;
  vf f = fma(n, set1(-0.693145752f), x);
  f = fma(n, set1(-1.42860677e-06f), f);
  vf p = set1(0.001381459878757596f);
  p = fma(p, f, set1(0.008368716575205326f));
  p = fma(p, f, set1(0.04166838899254799f));
  p = fma(p, f, set1(0.1666652113199234f));
  p = fma(p, f, set1(0.4999999403953552f));
  p = fma(p, f, set1(1.f));
  p = fma(p, f, set1(1.f));
  const vi result = (vi)((vu)p + ((vu)r << 23));  // unsigned: it wraps for the x that the next line discards
  return (vf)(result & ~(x < set1(-87.33654f)));  // a NaN compares false and stays
}

// 2^x for x <= 127; below -126 it fades out to exactly 0 at -127. A NaN stays. About 1 ulp. At -127 the polynomial is
// exactly 1, whose exponent field the shifted n takes away.
EFFVIT_INLINE vf exp2(vf x) {
  x = max(set1(-127.f), x);  // a NaN is the second operand, and stays
  const vf magic = set1(12582912.f);
  const vf r = x + magic;
  const vf f = x - (r - magic);
  vf p = set1(1.535336189e-4f);
  p = fma(p, f, set1(1.339887442e-3f));
  p = fma(p, f, set1(9.618437358e-3f));
  p = fma(p, f, set1(5.550332471e-2f));
  p = fma(p, f, set1(2.402264791e-1f));
  p = fma(p, f, set1(6.931472029e-1f));
  p = fma(p, f, set1(1.f));
  return (vf)((vu)p + ((vu)r << 23));
}

// exp of any float: overflows to infinity, fades out through the subnormals, keeps NaN. 2^n goes in two factors.
EFFVIT_INLINE vf exp_full(vf x) {
  x = max(set1(-104.f), min(set1(104.f), x));  // a NaN is the second operand of both, and stays
  const vf magic = set1(12582912.f);
  const vf r = fma(x, set1(1.44269504f), magic);
  const vf n = r - magic;
  vf f = fma(n, set1(-0.693145752f), x);
  f = fma(n, set1(-1.42860677e-06f), f);
  vf p = set1(0.001381459878757596f);
  p = fma(p, f, set1(0.008368716575205326f));
  p = fma(p, f, set1(0.04166838899254799f));
  p = fma(p, f, set1(0.1666652113199234f));
  p = fma(p, f, set1(0.4999999403953552f));
  p = fma(p, f, set1(1.f));
  p = fma(p, f, set1(1.f));
  const vi exponent = (vi)r - 0x4b400000;  // n: the bits of magic taken off
  const vi half = exponent >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23);
}

// Natural logarithm of normal positive numbers: exponent plus 2 atanh((m-1)/(m+1)), m in [sqrt(1/2), sqrt(2)).
EFFVIT_INLINE vf log(vf x) {
  const vi bits = float_to_bits(x);
  const vi e = (bits - 0x3f3504f3) >> 23;
  const vf m = bits_to_float(bits - (e << 23));
  const vf s = (m - 1.f) / (m + 1.f), z = s * s;
  vf p = fma(z, set1(0.2222222222f), set1(0.2857142857f));
  p = fma(z, p, set1(0.4f));
  p = fma(z, p, set1(0.6666666667f));
  p = fma(z, p, set1(2.f));
  return fma(__builtin_convertvector(e, vf), set1(0.693147181f), s * p);
}

// ---- element types -------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

EFFVIT_INLINE float to_float(float x) { return x; }
EFFVIT_INLINE float to_float(BFloat16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
EFFVIT_INLINE float to_float(Float16 x) {
#if defined(EFFVIT_HAS_AVX2) || defined(EFFVIT_HAS_AVX512)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits)));
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  uint32_t u = (magnitude << 13) + 0x38000000u;  // rebias the exponent
  if (magnitude >= 0x7c00u) u += 0x38000000u;  // inf, nan
  float f;
  if (magnitude < 0x0400u) {  // subnormal: magnitude * 2^-24
    f = static_cast<float>(magnitude) * 5.9604644775390625e-08f;
    std::memcpy(&u, &f, 4);
  }
  u |= sign;
  std::memcpy(&f, &u, 4);
  return f;
#endif
}

template <class T>
EFFVIT_INLINE T from_float(float x);
template <>
EFFVIT_INLINE float from_float<float>(float x) {
  return x;
}
template <>
EFFVIT_INLINE BFloat16 from_float<BFloat16>(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};  // to nearest, ties to even
}
template <>
EFFVIT_INLINE Float16 from_float<Float16>(float x) {
#if defined(EFFVIT_HAS_AVX2) || defined(EFFVIT_HAS_AVX512)
  return {static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), 0)))};
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (u >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (u < 0x38800000u) {  // subnormal result: adding 0.5 aligns it
    float f;
    std::memcpy(&f, &u, 4);
    f += 0.5f;
    std::memcpy(&u, &f, 4);
    return {static_cast<uint16_t>(sign | (u - 0x3f000000u))};
  }
  u += 0xc8000fffu + ((u >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (u >> 13))};
#endif
}

EFFVIT_INLINE vf load(const BFloat16* p) {
#if defined(EFFVIT_HAS_AVX512)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(EFFVIT_HAS_AVX2)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
EFFVIT_INLINE vf load(const Float16* p) {
#if defined(EFFVIT_HAS_AVX512)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(EFFVIT_HAS_AVX2)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

EFFVIT_INLINE void store(BFloat16* p, vf v) {
#if defined(EFFVIT_HAS_AVX512_BF16)  // subnormal results become zeros
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#elif defined(EFFVIT_HAS_AVX512) || defined(EFFVIT_HAS_AVX2)
  const vi u = (vi)v;
  vi rounded = (u + 0x7fff + ((vi)((u >> 16) & 1))) >> 16;
  const vi is_nan = v != v;
  rounded = (is_nan & ((u >> 16) | 0x40)) | (~is_nan & rounded);
#if defined(EFFVIT_HAS_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)rounded));
#else
  const __m256i low = _mm256_and_si256((__m256i)rounded, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#endif
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<BFloat16>(v[i]);
#endif
}
EFFVIT_INLINE void stream(BFloat16* p, vf v) {
#if defined(EFFVIT_HAS_AVX512_BF16)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  store(p, v);
#endif
}
EFFVIT_INLINE void store(Float16* p, vf v) {
#if defined(EFFVIT_HAS_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#elif defined(EFFVIT_HAS_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Float16>(v[i]);
#endif
}

// dst[0..n) = src * factor in float32, zeros up to round_up(n, kLanes).
template <class T>
EFFVIT_INLINE void load_row(float* dst, const T* src, int n, float factor = 1.f) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i) * factor);
  if (i < n) {
    store(dst + i, vf{});
    for (; i < n; ++i) dst[i] = to_float(src[i]) * factor;
  }
}

// dst[0..n) = src * factor, rounded to T. src is readable up to round_up(n, kLanes).
template <class T>
EFFVIT_INLINE void store_row(T* dst, const float* src, int n, float factor = 1.f) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i) * factor);
  for (; i < n; ++i) dst[i] = from_float<T>(src[i] * factor);
}

EFFVIT_INLINE float dot(const float* a, const float* b, int n) {  // n a multiple of kLanes
  vf s{};
  for (int i = 0; i < n; i += kLanes) s = fma(load(a + i), load(b + i), s);
  return reduce_add(s);
}

EFFVIT_INLINE void zero(float* p, int64_t n) {  // n a multiple of kLanes
  for (int64_t i = 0; i < n; i += kLanes) store(p + i, vf{});
}

// dst[0..n) += factor * src[0..n), n a multiple of kLanes
EFFVIT_INLINE void axpy(float* dst, float factor, const float* src, int n) {
  for (int i = 0; i < n; i += kLanes) store(dst + i, fma(set1(factor), load(src + i), load(dst + i)));
}

// total += x, what rounding takes off kept in `low`: however many terms, the sum is off by the rounding of one. An
// infinite total stays.
EFFVIT_INLINE void add_compensated(float* total, float* low, vf x) {
  const vf before = load(total), y = x + load(low), after = before + y, lost = y - (after - before);
  store(total, after);
  store(low, (vf)((vi)lost & (lost - lost == vf{})));
}

// Element i of a small tensor in whatever dtype it has.
EFFVIT_INLINE float load_scalar(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::kFloat32:
      return static_cast<const float*>(p)[i];
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(p)[i]);
    default:
      return to_float(static_cast<const Float16*>(p)[i]);
  }
}
EFFVIT_INLINE void store_scalar(void* p, DType t, int64_t i, float x) {
  switch (t) {
    case DType::kFloat32:
      static_cast<float*>(p)[i] = x;
      break;
    case DType::kBFloat16:
      static_cast<BFloat16*>(p)[i] = from_float<BFloat16>(x);
      break;
    default:
      static_cast<Float16*>(p)[i] = from_float<Float16>(x);
  }
}

// Calls f with a value of the element type.
template <class F>
EFFVIT_INLINE void dispatch_dtype(DType type, const F& f) {
  switch (type) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    default:
      return f(Float16{});
  }
}

// ---- transposes ----------------------------------------------------------------------------------------------------

// kLanes x kLanes in registers.
EFFVIT_INLINE void transpose_block(vf (&r)[kLanes]) {
#if EFFVIT_LANES == 8 && defined(EFFVIT_HAS_AVX2)
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
  }
  __m256 u[8];
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = (vf)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = (vf)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
#elif EFFVIT_LANES == 16 && defined(EFFVIT_HAS_AVX512)
  __m512 t[16], u[16];  // within 128 bits first: shuffles across them cost more
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps((__m512)r[i], (__m512)r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps((__m512)r[i], (__m512)r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd), d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    r[i] = (vf)_mm512_shuffle_f32x4(a, b, 0x88);
    r[i + 4] = (vf)_mm512_shuffle_f32x4(c, d, 0x88);
    r[i + 8] = (vf)_mm512_shuffle_f32x4(a, b, 0xdd);
    r[i + 12] = (vf)_mm512_shuffle_f32x4(c, d, 0xdd);
  }
#else
  // log2(kLanes) perfect shuffles of the register pairs (i, i + kLanes/2).
  for (int stage = kLanes; stage > 1; stage /= 2) {
    vf t[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
#if EFFVIT_LANES == 4
      t[2 * i] = __builtin_shufflevector(r[i], r[i + 2], 0, 4, 1, 5);
      t[2 * i + 1] = __builtin_shufflevector(r[i], r[i + 2], 2, 6, 3, 7);
#elif EFFVIT_LANES == 8
      t[2 * i] = __builtin_shufflevector(r[i], r[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      t[2 * i + 1] = __builtin_shufflevector(r[i], r[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
#else
      t[2 * i] = __builtin_shufflevector(r[i], r[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      t[2 * i + 1] =
          __builtin_shufflevector(r[i], r[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
    }
    for (int i = 0; i < kLanes; ++i) r[i] = t[i];
  }
#endif
}

// dst[c * ld + j] = row(j)[c] for j < n, c < cols; rows are float32, readable up to round_up(cols, kLanes).
// Columns n..round_up(n, kLanes) of dst become copies of row 0: finite whatever the caller does with them.
template <class Row>
EFFVIT_INLINE void transpose_rows(float* dst, int64_t ld, int n, int cols, const Row& row) {
  for (int j = 0; j < n; j += kLanes) {
    for (int c = 0; c < cols; c += kLanes) {
      vf r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) r[i] = load(row(j + i < n ? j + i : 0) + c);
      transpose_block(r);
      const int rows = cols - c < kLanes ? cols - c : kLanes;
      if (rows == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(dst + (c + i) * ld + j, r[i]);
      } else {
        for (int i = 0; i < rows; ++i) store(dst + (c + i) * ld + j, r[i]);
      }
    }
  }
}

// ---- float32 GEMM on registers -------------------------------------------------------------------------------------

// Register tile: kRows x up to kCols vectors, sized so that accumulators, one row of B and a broadcast fit the file;
// where the result has at most two vectors across, kTallRows rows: enough sums under way to hide the latency of each.
#if EFFVIT_LANES == 16  // the emulated ones too, though their registers do not hold it: what is tested is what runs
constexpr int kRows = 6, kTallRows = 8, kCols = 4;  // 24 + 4 + 1 of 32 registers
#else
constexpr int kRows = 3, kTallRows = 3, kCols = 4;  // 12 + 3 (one B vector is a memory operand) + 1 of 16 registers
#endif

// How A and B of a product C[m, n] += A[m, k] B[k, n] are addressed. steps(k): of the inner loop.
struct RowMajorA {  // a[r * ld + t]
  const Word* data;
  int64_t ld;
  EFFVIT_INLINE vf broadcast(int r, int t) const { return set1(data[r * ld + t]); }
  EFFVIT_INLINE static vf multiply_add(vf a, vf b, vf c) { return fma(a, b, c); }
  EFFVIT_INLINE static int steps(int k) { return k; }
  EFFVIT_INLINE RowMajorA rows_from(int r) const { return {data + r * ld, ld}; }
};
struct TransposedA {  // a[t * ld + r]
  const Word* data;
  int64_t ld;
  EFFVIT_INLINE vf broadcast(int r, int t) const { return set1(data[t * ld + r]); }
  EFFVIT_INLINE static vf multiply_add(vf a, vf b, vf c) { return fma(a, b, c); }
  EFFVIT_INLINE static int steps(int k) { return k; }
  EFFVIT_INLINE TransposedA rows_from(int r) const { return {data + r, ld}; }
};
struct DenseB {  // b[t * ld + column]
  const float* data;
  int64_t ld;
  EFFVIT_INLINE const float* operator()(int t) const { return data + t * ld; }
  EFFVIT_INLINE DenseB columns_from(int c) const { return {data + c, ld}; }
};

// The operands of a product from memory: float32 as they are; bf16.inl.h has the same for bfloat16.
EFFVIT_INLINE RowMajorA row_major(const float* a, int64_t ld) { return {a, ld}; }
EFFVIT_INLINE TransposedA transposed(const float* a, int64_t ld) { return {a, ld}; }
EFFVIT_INLINE DenseB right(const float* b, int64_t ld) { return {b, ld}; }

// Where the product goes: called once per vector of the result, with its row and column in the whole of C.
// What C holds already (a bias, say) is added last: its magnitude then enters one rounding instead of k.
struct StoreC {
  float* data;
  int64_t ld;
  bool accumulate;
  EFFVIT_INLINE void operator()(int r, int c, vf x) const {
    float* to = data + r * ld + c;
    store(to, accumulate ? load(to) + x : x);
  }
};
// Memory to fetch into L2 during a product, a line at a time: a burst of prefetches would fill the cache's miss
// buffers, and whatever else misses would wait. A line may be asked for more than once.
struct NoFetch {
  EFFVIT_INLINE void operator()(int) const {}
  EFFVIT_INLINE NoFetch from(int) const { return {}; }
};
struct Fetch {
  const char* data;  // null: nothing
  int64_t step;  // bytes per call
  EFFVIT_INLINE void operator()(int i) const { __builtin_prefetch(data + i * step, 0, 2); }
  EFFVIT_INLINE Fetch from(int i) const { return {data + i * step, step}; }
};

template <int MR, int NV, class A, class B, class C, class P>
EFFVIT_INLINE void gemm_tile(int k, A a, B b, C sink, int row, int column, P fetch) {
  vf acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = vf{};
  }
  for (int t = 0; t < k; ++t) {
    const float* from = b(t);
    fetch(t);
    vf bv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) bv[j] = load(from + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const vf av = a.broadcast(r, t);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[r][j] = A::multiply_add(av, bv[j], acc[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sink(row + r, column + j * kLanes, acc[r][j]);
  }
}

// MR rows of C, from `row` on; n a multiple of kLanes. Columns go in blocks of nearly equal width: 7 is 4 + 3.
template <int MR, bool kNarrow, class A, class B, class C, class P>
inline __attribute__((noinline)) void gemm_rows(int n, int k, A a, B b, C sink, int row, P fetch) {
  if constexpr (kNarrow) {  // n is one vector or two
    if (n == kLanes) return gemm_tile<MR, 1>(k, a, b, sink, row, 0, fetch);
    return gemm_tile<MR, 2>(k, a, b, sink, row, 0, fetch);
  }
  int vectors = n / kLanes, blocks = (vectors + kCols - 1) / kCols, column = 0;
  for (; blocks > 0; --blocks) {
    const int width = blocks == 1 ? vectors : (vectors + blocks - 1) / blocks;
    switch (width) {
      case 1:
        gemm_tile<MR, 1>(k, a, b, sink, row, column, fetch);
        break;
      case 2:
        gemm_tile<MR, 2>(k, a, b, sink, row, column, fetch);
        break;
      case 3:
        gemm_tile<MR, 3>(k, a, b, sink, row, column, fetch);
        break;
      default:
        gemm_tile<MR, 4>(k, a, b, sink, row, column, fetch);
        break;
    }
    vectors -= width;
    column += width * kLanes;
    b = b.columns_from(width * kLanes);
    fetch = fetch.from(k);
  }
}

// How often gemm_into asks for something to fetch, for a result of m x n.
constexpr int gemm_steps(int m, int n) { return m / (n <= 2 * kLanes ? kTallRows : kRows); }

// A[m, k] B[k, n], handed to the sink. ahead(calls) is asked before every few rows for a Fetch to make meanwhile.
template <class A, class B, class C, class F>
EFFVIT_INLINE void gemm_into(int m, int n, int k_elements, A a, B b, C sink, const F& ahead) {
  const int k = A::steps(k_elements), calls = k * ((n / kLanes + kCols - 1) / kCols);
  int r = 0;
  const auto blocks_of = [&](auto rows, auto narrow) __attribute__((always_inline)) {
    constexpr int kBlock = decltype(rows)::value;
    constexpr bool kNarrow = decltype(narrow)::value;
    for (; r + kBlock <= m; r += kBlock) {
      if (const Fetch fetch = ahead(calls); fetch.data) {
        gemm_rows<kBlock, kNarrow>(n, k, a.rows_from(r), b, sink, r, fetch);
      } else {
        gemm_rows<kBlock, kNarrow>(n, k, a.rows_from(r), b, sink, r, NoFetch{});
      }
    }
  };
  if (n <= 2 * kLanes && kTallRows > kRows) {
    blocks_of(std::integral_constant<int, kTallRows>{}, std::true_type{});
  } else {
    blocks_of(std::integral_constant<int, kRows>{}, std::false_type{});
  }
  if constexpr (kRows > 4) {
    for (; r + 4 <= m; r += 4) gemm_rows<4, false>(n, k, a.rows_from(r), b, sink, r, NoFetch{});
  }
  for (; r + 2 <= m; r += 2) gemm_rows<2, false>(n, k, a.rows_from(r), b, sink, r, NoFetch{});
  if (r < m) gemm_rows<1, false>(n, k, a.rows_from(r), b, sink, r, NoFetch{});
}
template <class A, class B, class C>
EFFVIT_INLINE void gemm_into(int m, int n, int k, A a, B b, C sink) {
  gemm_into(m, n, k, a, b, sink, [](int) { return Fetch{}; });
}

}  // namespace effvit::cpu::EFFVIT_ISA_NAME
