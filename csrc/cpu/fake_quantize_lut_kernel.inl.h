// fake_quantize_lut on the CPU: forward, on raw pointers, compiled once per ISA. See lut.inl.h.
#pragma once

#include "lut.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace fake_quantize_lut_impl {

using Params = FakeQuantizeLutParams;

void run(const Params& p, float*, int64_t begin, int64_t end) { lut_impl::fake_quantize(p, begin, end); }
int64_t units(const Params& p) { return lut_impl::units(p); }

constexpr Step<Params> kForward[] = {{units, run}};

}  // namespace fake_quantize_lut_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<FakeQuantizeLutParams>* EFFVIT_KERNEL_NAME(fake_quantize_lut)() {
  namespace impl = EFFVIT_ISA_NAME::fake_quantize_lut_impl;
  static constexpr Kernel<FakeQuantizeLutParams> kernel = {routine(impl::kForward), {}};
  return &kernel;
}
}  // namespace effvit::cpu
