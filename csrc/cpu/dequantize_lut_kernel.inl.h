// dequantize_lut on the CPU: forward, on raw pointers, compiled once per ISA. See lut.inl.h.
#pragma once

#include "lut.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace dequantize_lut_impl {

using Params = DequantizeLutParams;

void run(const Params& p, float*, int64_t begin, int64_t end) { lut_impl::dequantize(p, begin, end); }
int64_t units(const Params& p) { return lut_impl::units(p); }

constexpr Step<Params> kForward[] = {{units, run}};

}  // namespace dequantize_lut_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<DequantizeLutParams>* EFFVIT_KERNEL_NAME(dequantize_lut)() {
  namespace impl = EFFVIT_ISA_NAME::dequantize_lut_impl;
  static constexpr Kernel<DequantizeLutParams> kernel = {routine(impl::kForward), {}};
  return &kernel;
}
}  // namespace effvit::cpu
