// Entry points of the rbf_gram CPU kernels, one set per ISA. Torch-free: microbenchmarks use it too.
#pragma once

#include "../common/rbf_gram_params.h"
#include "isa/isa.h"

namespace effvit::cpu {

struct RbfGramKernel {
  // Independent units of work, to be spread over threads in any way. Their number depends on the shape alone.
  int64_t (*forward_units)(const RbfGramParams& p);
  void (*forward)(const RbfGramParams& p, int64_t begin, int64_t end);
  // A unit is a part of the queries of one head. Where there are several parts, each owns a slice of `partials`
  // (backward_partials(p) floats, 0 for one part), which backward_reduce sums in a fixed order into dk.
  int64_t (*backward_units)(const RbfGramParams& p);
  int64_t (*backward_partials)(const RbfGramParams& p);
  void (*backward)(const RbfGramParams& p, float* partials, int64_t begin, int64_t end);
  void (*backward_reduce)(const RbfGramParams& p, const float* partials);
};

EFFVIT_DECLARE_KERNEL(RbfGramKernel, rbf_gram)

}  // namespace effvit::cpu
