// int8_linear on the CPU: forward, on raw pointers, compiled once per ISA. See int8_gemm.inl.h; kInt8Dot says that the
// ISA has products of bytes.
#pragma once

#include "int8_dense.inl.h"
#include "int8_epilogue.inl.h"

namespace effvit::cpu {
const Kernel<Int8LinearParams>* EFFVIT_KERNEL_NAME(int8_linear)() {
  using namespace EFFVIT_ISA_NAME::int8_impl;
  static constexpr Kernel<Int8LinearParams> kernel = {
      routine(Dense<Int8LinearParams>::kSteps, workspace<Int8LinearParams>), {}};
  return &kernel;
}
}  // namespace effvit::cpu
