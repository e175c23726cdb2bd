// Entry points of the linear_attention CPU kernels, one set per ISA. Torch-free: microbenchmarks use it too.
#pragma once

#include "../common/linear_attention_params.h"
#include "isa/isa.h"

namespace effvit::cpu {

struct LinearAttentionKernel {
  // Forward and backward run in phases, one after the other. A phase is a number of independent units of work (perhaps
  // none), to be spread over threads in any way. Partial states pass from phase to phase in `workspace`, that many
  // floats. The units and the grouping of the sums depend on the shape alone, never on the number of threads.
  int (*phases)(bool backward);
  int64_t (*workspace)(const LinearAttentionParams& p, bool backward);
  int64_t (*units)(const LinearAttentionParams& p, bool backward, int phase);
  void (*run)(const LinearAttentionParams& p, bool backward, int phase, float* workspace, int64_t begin, int64_t end);
};

EFFVIT_DECLARE_KERNEL(LinearAttentionKernel, linear_attention)

}  // namespace effvit::cpu
