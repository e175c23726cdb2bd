// sparse24_linear on the CPU: entry points, on raw pointers, compiled once per ISA. Forward and gradients are in the
// files that it includes.
#pragma once

#include "sparse24_linear_weights.inl.h"

#include "sparse24_linear_backward.inl.h"
#include "sparse24_linear_forward.inl.h"

namespace effvit::cpu {
const Kernel<Sparse24LinearParams>* EFFVIT_KERNEL_NAME(sparse24_linear)() {
  namespace impl = EFFVIT_ISA_NAME::sparse24_linear_impl;
  static constexpr Kernel<Sparse24LinearParams> kernel = {routine(impl::kForward, impl::forward_workspace),
                                                          routine(impl::kBackward, impl::backward_workspace)};
  return &kernel;
}
}  // namespace effvit::cpu
