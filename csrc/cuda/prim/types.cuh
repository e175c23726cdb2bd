// Element types, vectors of them, conversions and the few scalar functions kernels use.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(EFFVIT_EMU)
#include <cmath>

#include "../../emu/emulator.h"
#define EFFVIT_DEVICE inline
#define EFFVIT_NOINLINE inline
#define EFFVIT_KERNEL(threads, min_ctas) void
#define EFFVIT_GRID_CONSTANT const
#define EFFVIT_UNROLL
#define EFFVIT_NO_UNROLL
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "error"; }
#elif defined(__CUDACC__)
#include <cuda_runtime.h>
#define EFFVIT_DEVICE __device__ __forceinline__
#define EFFVIT_NOINLINE __device__ __noinline__  // for code that is rare and large
#define EFFVIT_KERNEL(threads, min_ctas) __global__ void __launch_bounds__(threads, min_ctas)
#define EFFVIT_GRID_CONSTANT const __grid_constant__
#define EFFVIT_UNROLL _Pragma("unroll")
#define EFFVIT_NO_UNROLL _Pragma("unroll 1")
#else
#error "compile with nvcc, or with -DEFFVIT_EMU against csrc/emu"
#endif

namespace effvit {
namespace prim {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

// By value: of a reference nvcc forgets the alignment, and copies from memory byte by byte.
template <class To, class From>
EFFVIT_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

EFFVIT_DEVICE float to_float(float x) { return x; }
EFFVIT_DEVICE float to_float(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

#if defined(EFFVIT_EMU)

EFFVIT_DEVICE float to_float(float16 x) { return emu::half_to_float(x.bits); }

template <class T>
EFFVIT_DEVICE T from_float(float x) {
  if constexpr (std::is_same<T, float>::value) {
    return x;
  } else if constexpr (std::is_same<T, float16>::value) {
    return {emu::float_to_half(x)};
  } else {
    static_assert(std::is_same<T, bfloat16>::value, "unknown element type");
    uint32_t bits = bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    bits += 0x7fffu + (bits >> 16 & 1u);
    return {static_cast<uint16_t>(bits >> 16)};
  }
}

EFFVIT_DEVICE float exp2(float x) { return std::exp2(x); }
EFFVIT_DEVICE float exp(float x) { return std::exp(x); }
EFFVIT_DEVICE float log(float x) { return std::log(x); }
EFFVIT_DEVICE float sqrt(float x) { return std::sqrt(x); }
EFFVIT_DEVICE int32_t round_to_int(float x) { return emu::float_to_int(x); }
EFFVIT_DEVICE float product(float x, float y) {
  const volatile float p = x * y;  // or the compiler may add to it before it rounds, on machines that can
  return p;
}
EFFVIT_DEVICE uint32_t shift_right(uint32_t x, uint32_t n) { return x >> (n & 31u); }
EFFVIT_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(both >> (selector >> (4 * i) & 7u) * 8 & 0xffu) << (8 * i);
  return r;
}

#else

EFFVIT_DEVICE float to_float(float16 x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
}

template <class T>
EFFVIT_DEVICE T from_float(float x) {
  if constexpr (std::is_same<T, float>::value) {
    return x;
  } else if constexpr (std::is_same<T, float16>::value) {
    T y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
  } else {
    static_assert(std::is_same<T, bfloat16>::value, "unknown element type");
    T y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
  }
}

EFFVIT_DEVICE float exp2(float x) {  // 2 ulp; -inf gives 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
EFFVIT_DEVICE float exp(float x) { return ::expf(x); }
EFFVIT_DEVICE float log(float x) { return ::logf(x); }
EFFVIT_DEVICE float sqrt(float x) { return ::sqrtf(x); }
EFFVIT_DEVICE int32_t round_to_int(float x) { return __float2int_rn(x); }  // ties to even, saturating; NaN gives 0
EFFVIT_DEVICE float product(float x, float y) { return __fmul_rn(x, y); }  // rounded: never part of a multiply-add
EFFVIT_DEVICE uint32_t shift_right(uint32_t x, uint32_t n) { return __funnelshift_r(x, 0, n); }  // by n modulo 32
// Bytes of eight: 0 to 3 are those of `low`. A hexadecimal digit of the selector is the number of one, the lowest
// first.
EFFVIT_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

#endif

// Two elements in one register, `low` in the low half.
template <class T>
EFFVIT_DEVICE uint32_t pack2(float low, float high) {
#if defined(EFFVIT_EMU)
  return static_cast<uint32_t>(from_float<T>(low).bits) | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#else
  uint32_t r;
  if constexpr (std::is_same<T, float16>::value) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same<T, bfloat16>::value, "unknown element type");
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
#endif
}

}  // namespace prim
}  // namespace effvit
