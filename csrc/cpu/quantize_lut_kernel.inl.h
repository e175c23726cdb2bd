// quantize_lut on the CPU: forward, on raw pointers, compiled once per ISA. See lut.inl.h.
#pragma once

#include "lut.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace quantize_lut_impl {

using Params = QuantizeLutParams;

void run(const Params& p, float*, int64_t begin, int64_t end) { lut_impl::quantize(p, begin, end); }
int64_t units(const Params& p) { return lut_impl::units(p); }

constexpr Step<Params> kForward[] = {{units, run}};

}  // namespace quantize_lut_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<QuantizeLutParams>* EFFVIT_KERNEL_NAME(quantize_lut)() {
  namespace impl = EFFVIT_ISA_NAME::quantize_lut_impl;
  static constexpr Kernel<QuantizeLutParams> kernel = {routine(impl::kForward), {}};
  return &kernel;
}
}  // namespace effvit::cpu
