// Which instruction set the CPU kernels run on: detected once, forced by EFFVIT_ISA or effvit_cpu_set_isa.
#pragma once
#include <cstddef>
#include <cstdint>

namespace effvit::cpu {

// Ordered: the best available one is used. The emulated ones run the wide code paths (16-lane vectors, bfloat16 dot
// products, AMX tiles) on any AVX2 machine, for tests; they exist in test builds (EFFVIT_TEST_ISAS) and are only ever
// chosen by name.
enum class Isa : int32_t {
  kGeneric,
  kAvx2,
  kAvx512,
  kAvx512Bf16,
  kAmx,
  kAvx512Emulated,
  kAvx512Bf16Emulated,
  kAmxEmulated
};
inline constexpr int kIsaCount = 8;

Isa current_isa();

// 64-byte aligned scratch of the calling thread, at least `bytes` long. Kept for the next call, contents undefined.
void* thread_scratch(size_t bytes);

// Picks the current ISA's entry from a table indexed by Isa. An ISA is only ever chosen where the build has it, so
// there is no fallback here that a test could mistake for the kernel it asked for.
template <class Kernel>
const Kernel& select(const Kernel* const (&table)[kIsaCount]) {
  return *table[static_cast<int>(current_isa())];
}

}  // namespace effvit::cpu

// In namespace effvit::cpu: declares op_<isa>(), which every translation unit of the op's kernel defines, and defines
// `const Kernel& op_kernel()`, the table of entry points of the current ISA.
#define EFFVIT_DECLARE_KERNEL(Kernel, op)                                                                     \
  const Kernel* op##_generic();                                                                               \
  EFFVIT_IF_X86(const Kernel* op##_avx2(); const Kernel* op##_avx512(); const Kernel* op##_avx512_bf16();     \
                const Kernel* op##_amx();)                                                                    \
  EFFVIT_IF_TEST_ISAS(const Kernel* op##_avx512_emulated(); const Kernel* op##_avx512_bf16_emulated();        \
                      const Kernel* op##_amx_emulated();)                                                     \
  inline const Kernel& op##_kernel() {                                                                        \
    static const Kernel* const table[kIsaCount] = {                                                           \
        op##_generic() EFFVIT_IF_X86(, op##_avx2(), op##_avx512(), op##_avx512_bf16(), op##_amx())            \
            EFFVIT_IF_TEST_ISAS(, op##_avx512_emulated(), op##_avx512_bf16_emulated(), op##_amx_emulated())}; \
    return select(table);                                                                                     \
  }
#if defined(__x86_64__)
#define EFFVIT_IF_X86(...) __VA_ARGS__
#else
#define EFFVIT_IF_X86(...)
#endif
#if defined(EFFVIT_TEST_ISAS)
#define EFFVIT_IF_TEST_ISAS(...) __VA_ARGS__
#else
#define EFFVIT_IF_TEST_ISAS(...)
#endif
