// int_linear on the CPU: forward, on raw pointers, compiled once per ISA. The product of int8_linear, with the epilogue
// of integers; kInt8Dot says that the ISA has products of bytes.
#pragma once

#include "int8_dense.inl.h"
#include "int_epilogue.inl.h"

namespace effvit::cpu {
const Kernel<IntLinearParams>* EFFVIT_KERNEL_NAME(int_linear)() {
  using namespace EFFVIT_ISA_NAME::int8_impl;
  static constexpr Kernel<IntLinearParams> kernel = {
      routine(Dense<IntLinearParams>::kSteps, workspace<IntLinearParams>), {}};
  return &kernel;
}
}  // namespace effvit::cpu
