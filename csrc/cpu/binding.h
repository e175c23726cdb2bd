// Runs a checked call on the CPU: instruction set, workspace, threads. CMake writes a file per op that has
// EFFVIT_CPU_OP.
#pragma once

#include "../common/binding.h"
#include "kernel.h"

namespace effvit::cpu {

struct Backend {
  static constexpr bool kReadable = true;

  template <class Op>
  static void run(Binding& binding, bool backward) {
    const auto p = Op::params(binding.call);
    const auto* kernel = cpu::kernel<std::decay_t<decltype(p)>>();
    const auto& routine = backward ? kernel->backward : kernel->forward;
    float* const workspace = binding.workspace(routine.floats(p));
    for (const auto& step : routine) {
      parallel_for(step.units(p), 1, [&](int64_t begin, int64_t end) { step.run(p, workspace, begin, end); });
    }
  }
};

}  // namespace effvit::cpu

#define EFFVIT_CPU_OP(op) EFFVIT_REGISTER(op, effvit::cpu::Backend, effvit::cpu::runs_here())
