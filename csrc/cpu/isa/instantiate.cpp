// Compiles one op's kernel for one instruction set. CMake writes a file that includes this one per
// csrc/cpu/*_kernel.inl.h and instruction set. It defines EFFVIT_OP, EFFVIT_KERNEL_HEADER, EFFVIT_PARAMS_HEADER
// and, from the table in isas.h, EFFVIT_ISA_NAME, EFFVIT_LANES, EFFVIT_TARGET and EFFVIT_HAS_<...>. Everything with
// code in it is included before the target region, so that no inline function shared with another file is compiled for
// a wider ISA: the linker would be free to keep that copy, and it would be an illegal instruction elsewhere.
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

#if defined(EFFVIT_HAS_AVX512_BF16)  // CPUs that have it have VNNI
#define EFFVIT_HAS_AVX512_VNNI 1
#define EFFVIT_HAS_BF16_PRODUCTS 1
#endif
#if defined(EFFVIT_HAS_EMULATED_TILES)
#define EFFVIT_HAS_TILES 1
#define EFFVIT_HAS_BF16_PRODUCTS 1
#define EFFVIT_HAS_INT8_DOT 1
#endif
#if defined(EFFVIT_HAS_AVX_VNNI) || defined(EFFVIT_HAS_AVX512_VNNI)
#define EFFVIT_HAS_INT8_DOT 1
#endif

// Kernel entry points: `EFFVIT_KERNEL_NAME(op)` is op_<isa>.
#define EFFVIT_CONCAT2(a, b) a##_##b
#define EFFVIT_CONCAT(a, b) EFFVIT_CONCAT2(a, b)
#define EFFVIT_KERNEL_NAME(op) EFFVIT_CONCAT(op, EFFVIT_ISA_NAME)

#include <type_traits>
#include <utility>

#if defined(EFFVIT_PARAMS_HEADER)  // not code that ops share
#include EFFVIT_PARAMS_HEADER
#include "../kernel.h"
#endif

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
#include "permute.inl.h"
#include "bf16.inl.h"
#include "int8.inl.h"
#include "rescale.inl.h"
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

#if defined(EFFVIT_PARAMS_HEADER)
namespace effvit::cpu {
namespace {
[[maybe_unused]] const auto registered = set_kernel(Isa::EFFVIT_ISA_NAME, EFFVIT_KERNEL_NAME(EFFVIT_OP)());
}  // namespace
}  // namespace effvit::cpu
#endif
