// Entry points of the newton_pinv CPU kernels, one set per ISA. Torch-free: microbenchmarks use it too.
#pragma once

#include "../common/newton_pinv_params.h"
#include "isa/isa.h"

namespace effvit::cpu {

struct NewtonPinvKernel {
  // A unit is a matrix. Units may be spread over threads in any way.
  void (*forward)(const NewtonPinvParams& p, int64_t begin, int64_t end);
  void (*backward)(const NewtonPinvParams& p, int64_t begin, int64_t end);
};

EFFVIT_DECLARE_KERNEL(NewtonPinvKernel, newton_pinv)

}  // namespace effvit::cpu
