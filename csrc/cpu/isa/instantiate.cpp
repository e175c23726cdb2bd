// Compiles one op's kernel for one ISA. CMake builds this file once per csrc/cpu/*_kernel.inl.h and ISA, with
// -DEFFVIT_KERNEL_HEADER="../<op>_kernel.inl.h" and -DEFFVIT_ISA_<NAME>. Everything with code in it is included before
// the target region, so that no inline function shared with another file is compiled for a wider ISA: the linker
// would be free to keep that copy, and it would be an illegal instruction elsewhere.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../common/dtype.h"
#include "isa.h"
#include "tiles.h"

#if defined(EFFVIT_ISA_AVX2) || defined(EFFVIT_ISA_AVX512_EMULATED) || defined(EFFVIT_ISA_AVX512_BF16_EMULATED) || \
    defined(EFFVIT_ISA_AMX_EMULATED)
#define EFFVIT_TARGET "avx2,fma,f16c"
#elif defined(EFFVIT_ISA_AVX512)
#define EFFVIT_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#elif defined(EFFVIT_ISA_AVX512_BF16)
#define EFFVIT_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#elif defined(EFFVIT_ISA_AMX)
#define EFFVIT_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"
#endif

#if defined(EFFVIT_ISA_GENERIC)
#define EFFVIT_ISA_NAME generic
#define EFFVIT_LANES 4
#elif defined(EFFVIT_ISA_AVX2)
#define EFFVIT_ISA_NAME avx2
#define EFFVIT_LANES 8
#define EFFVIT_HAS_AVX2 1
#elif defined(EFFVIT_ISA_AVX512)
#define EFFVIT_ISA_NAME avx512
#define EFFVIT_LANES 16
#define EFFVIT_HAS_AVX512 1
#elif defined(EFFVIT_ISA_AVX512_BF16)
#define EFFVIT_ISA_NAME avx512_bf16
#define EFFVIT_LANES 16
#define EFFVIT_HAS_AVX512 1
#define EFFVIT_HAS_AVX512_BF16 1
#define EFFVIT_HAS_BF16_PRODUCTS 1
#elif defined(EFFVIT_ISA_AMX)
#define EFFVIT_ISA_NAME amx
#define EFFVIT_LANES 16
#define EFFVIT_HAS_AVX512 1
#define EFFVIT_HAS_AVX512_BF16 1
#define EFFVIT_HAS_BF16_PRODUCTS 1
#define EFFVIT_HAS_TILES 1
#elif defined(EFFVIT_ISA_AVX512_EMULATED)
#define EFFVIT_ISA_NAME avx512_emulated
#define EFFVIT_LANES 16
#elif defined(EFFVIT_ISA_AVX512_BF16_EMULATED)
#define EFFVIT_ISA_NAME avx512_bf16_emulated
#define EFFVIT_LANES 16
#define EFFVIT_HAS_BF16_PRODUCTS 1
#elif defined(EFFVIT_ISA_AMX_EMULATED)
#define EFFVIT_ISA_NAME amx_emulated
#define EFFVIT_LANES 16
#define EFFVIT_HAS_BF16_PRODUCTS 1
#define EFFVIT_HAS_TILES 1
#define EFFVIT_EMULATED_TILES 1
#else
#error "no ISA named"
#endif

// Kernel entry points: `EFFVIT_KERNEL_NAME(op)` is op_<isa>.
#define EFFVIT_CONCAT2(a, b) a##_##b
#define EFFVIT_CONCAT(a, b) EFFVIT_CONCAT2(a, b)
#define EFFVIT_KERNEL_NAME(op) EFFVIT_CONCAT(op, EFFVIT_ISA_NAME)

#include <type_traits>
#include <utility>

#include EFFVIT_KERNEL_DECLARATIONS

#if defined(EFFVIT_TARGET)
#if defined(__clang__)
#define EFFVIT_CLANG_PRAGMA2(x) _Pragma(#x)
#define EFFVIT_CLANG_PRAGMA(x) EFFVIT_CLANG_PRAGMA2(x)
EFFVIT_CLANG_PRAGMA(clang attribute push(__attribute__((target(EFFVIT_TARGET))), apply_to = function))
#else
#define EFFVIT_GCC_PRAGMA2(x) _Pragma(#x)
#define EFFVIT_GCC_PRAGMA(x) EFFVIT_GCC_PRAGMA2(x)
EFFVIT_GCC_PRAGMA(GCC push_options)
EFFVIT_GCC_PRAGMA(GCC target(EFFVIT_TARGET))
#endif
#endif

// GCC 12's own AVX-512 headers start from uninitialised vectors on purpose and are warned about where they inline.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "scratch.inl.h"
#include "vec.inl.h"
#include "bf16.inl.h"
#include "../gemm.h"
#include "tokens.inl.h"
#include EFFVIT_KERNEL_HEADER

#if defined(EFFVIT_TARGET)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
