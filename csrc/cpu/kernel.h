// What a CPU kernel offers to its callers, and the table of them: one per op and instruction set. No torch:
// microbenchmarks use it too.
#pragma once

#include <cstdint>

#include "isa/isa.h"

namespace effvit::cpu {

// A step is a number of independent units of work (perhaps none), to be spread over threads in any way. The units, and
// how sums are grouped, depend on the shape alone, never on the number of threads. `run` takes units [begin, end).
template <class Params>
struct Step {
  int64_t (*units)(const Params& p);
  void (*run)(const Params& p, float* workspace, int64_t begin, int64_t end);
};

// Steps that run one after the other. Partial results go from one to the next in the workspace.
template <class Params>
struct Routine {
  const Step<Params>* steps;
  int count;
  int64_t (*workspace)(const Params& p);  // in floats; null: none

  int64_t floats(const Params& p) const { return workspace ? workspace(p) : 0; }
  const Step<Params>* begin() const { return steps; }
  const Step<Params>* end() const { return steps + count; }
};

template <class Params, int n>
constexpr Routine<Params> routine(const Step<Params> (&steps)[n], int64_t (*workspace)(const Params&) = nullptr) {
  return {steps, n, workspace};
}

template <class Params>
struct Kernel {
  Routine<Params> forward, backward;
};

// An op's kernels by instruction set. instantiate.cpp fills the table before main.
template <class Params>
inline const Kernel<Params>* kernels[kIsaCount] = {};

// The current instruction set's kernel, or that of its nearest base that the op was compiled for.
template <class Params>
const Kernel<Params>* kernel() {
  return select(kernels<Params>);
}

template <class Params>
const Kernel<Params>* set_kernel(Isa isa, const Kernel<Params>* kernel) {
  return kernels<Params>[static_cast<int>(isa)] = kernel;
}

}  // namespace effvit::cpu
