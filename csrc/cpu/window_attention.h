// Entry points of the window_attention CPU kernels, one set per ISA. Torch-free: microbenchmarks use it too.
#pragma once

#include "../common/window_attention_params.h"
#include "isa/isa.h"

namespace effvit::cpu {

struct WindowAttentionKernel {
  // Forward: independent units of work, to be spread over threads in any way.
  int64_t (*forward_units)(const WindowAttentionParams& p);
  void (*forward)(const WindowAttentionParams& p, int64_t begin, int64_t end);
  // Backward: units likewise; each owns a slice of `partials` (backward_partials(p) floats), which backward_reduce sums
  // in a fixed order into the gradients of the table, the temperature and the pads. The split depends on the shape
  // alone, so the result does not depend on the number of threads.
  int64_t (*backward_units)(const WindowAttentionParams& p);
  int64_t (*backward_partials)(const WindowAttentionParams& p);
  void (*backward)(const WindowAttentionParams& p, float* partials, int64_t begin, int64_t end);
  void (*backward_reduce)(const WindowAttentionParams& p, const float* partials);
};

#define EFFVIT_DECLARE(isa) const WindowAttentionKernel* window_attention_##isa();
EFFVIT_DECLARE(generic)
EFFVIT_X86_KERNELS(EFFVIT_DECLARE)
#if defined(EFFVIT_TEST_ISAS)
EFFVIT_DECLARE(avx512_emulated)
EFFVIT_DECLARE(amx_emulated)
#endif
#undef EFFVIT_DECLARE

inline const WindowAttentionKernel& window_attention_kernel() {
  static const WindowAttentionKernel* const table[kIsaCount] = {
      window_attention_generic(),
#if defined(__x86_64__)
      window_attention_avx2(),
      window_attention_avx512(),
      window_attention_amx(),
#else
      nullptr,
      nullptr,
      nullptr,
#endif
#if defined(EFFVIT_TEST_ISAS)
      window_attention_avx512_emulated(),
      window_attention_amx_emulated(),
#else
      nullptr,
      nullptr,
#endif
  };
  return select(table);
}

}  // namespace effvit::cpu
