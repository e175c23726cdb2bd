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

EFFVIT_DECLARE_KERNEL(WindowAttentionKernel, window_attention)

}  // namespace effvit::cpu
