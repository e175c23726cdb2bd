// Which instruction set the CPU kernels run on: detected once, forced by EFFVIT_ISA or effvit_cpu_set_isa.
#pragma once
#include <cstddef>
#include <cstdint>

namespace effvit::cpu {

// In the order of isas.h, best last; the emulated ones run the wide code paths (16-lane vectors, bfloat16 dot products,
// tiles) on any AVX2 machine, for tests, and are only ever chosen by name.
enum class Isa : int32_t {
#define EFFVIT_ISA(name, base, adds, lanes, emulates, target, has) name,
#include "isas.h"
#undef EFFVIT_ISA
};
inline constexpr int kIsaCount = 0
#define EFFVIT_ISA(name, base, adds, lanes, emulates, target, has) +1
#include "isas.h"
#undef EFFVIT_ISA
    ;

Isa current_isa();

// Whether this machine has any instruction set that this library was compiled for. AMX is asked for only where there is
// nothing else.
bool runs_here();

// The instruction set that serves an op which has no use for what this one adds, or -1.
int base_of(Isa isa);

// 64-byte aligned scratch of the calling thread, at least `bytes` long. Kept for the next call, contents undefined.
void* thread_scratch(size_t bytes);

// The current instruction set's entry, or that of its nearest base that an op was compiled for.
template <class Kernel>
const Kernel* select(const Kernel* const (&table)[kIsaCount]) {
  int isa = static_cast<int>(current_isa());
  while (isa >= 0 && !table[isa]) isa = base_of(static_cast<Isa>(isa));
  return isa < 0 ? nullptr : table[isa];
}

}  // namespace effvit::cpu
