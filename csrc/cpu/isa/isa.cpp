// Detection and choice of the instruction set; the per-thread scratch arena. Compiled for the baseline.
#include "isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace effvit::cpu {
namespace {

struct Entry {
  const char *name, *base, *emulates;
};
constexpr Entry kIsas[kIsaCount] = {
#define EFFVIT_ISA(name, base, adds, lanes, emulates, target, has) {#name, #base, #emulates},
#include "isas.h"
#undef EFFVIT_ISA
};
constexpr const char* kBuilt = "," EFFVIT_BUILT_ISAS ",";  // what this library was compiled for

bool is_built(Isa isa) {
  const std::string name = kIsas[static_cast<int>(isa)].name;
  return std::string(kBuilt).find("," + name + ",") != std::string::npos;
}
bool is_emulated(Isa isa) { return kIsas[static_cast<int>(isa)].emulates[0] != '-'; }

#if defined(__x86_64__)
uint64_t xgetbv0() {
  uint32_t lo = 0, hi = 0;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t{hi} << 32) | lo;
}

struct Features {
  bool avx2 = false, avx_vnni = false, avx512 = false, avx512_vnni = false, avx512_bf16 = false, amx = false;
};

Features detect() {
  Features f;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave) return f;
  const uint64_t xcr0 = xgetbv0();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = (xcr0 & 0x6) == 0x6 && fma && f16c && (b & (1u << 5));
  constexpr uint32_t kAvx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  f.avx512 = f.avx2 && (xcr0 & 0xe6) == 0xe6 && (b & kAvx512) == kAvx512;
  constexpr uint32_t kAmx = (1u << 22) | (1u << 24) | (1u << 25);  // AMX-BF16, AMX-TILE, AMX-INT8
  f.avx512_vnni = f.avx512 && (c & (1u << 11));
  uint32_t a1 = 0, b1 = 0, c1 = 0, d1 = 0;
  if (a >= 1) __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
  f.avx_vnni = f.avx2 && (a1 & (1u << 4));
  f.avx512_bf16 = f.avx512_vnni && (a1 & (1u << 5));
  f.amx = f.avx512_bf16 && (xcr0 & 0x60000) == 0x60000 && (d & kAmx) == kAmx;
  return f;
}

// Linux hands out the tile state only on request; the request is made once, when AMX would first be used.
bool amx_permitted() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  static const bool ok = syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
  return ok;
#else
  return false;
#endif
}

bool has(Isa isa) {
  static const Features f = detect();
  if (is_emulated(isa)) return f.avx2;
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::avx2:
      return f.avx2;
    case Isa::avx_vnni:
      return f.avx_vnni;
    case Isa::avx512:
      return f.avx512;
    case Isa::avx512_vnni:
      return f.avx512_vnni;
    case Isa::avx512_bf16:
      return f.avx512_bf16;
    case Isa::amx:
      return f.amx && amx_permitted();
    default:
      return false;
  }
}
#else
bool has(Isa isa) { return isa == Isa::generic; }
#endif

bool available(Isa isa) { return is_built(isa) && has(isa); }

// The last real one that `ok` holds for, or -1.
template <class F>
int best(const F& ok) {
  int found = -1;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!is_emulated(isa) && ok(isa)) found = i;
  }
  return found;
}

int find(const char* name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kIsas[i].name) == 0) return i;
  }
  return -1;
}

int initial() {
  const char* forced = std::getenv("EFFVIT_ISA");
  const int isa = forced && *forced ? find(forced) : -1;
  return isa >= 0 && available(static_cast<Isa>(isa)) ? isa : best(available);
}

std::atomic<int>& chosen() {
  static std::atomic<int> isa{initial()};
  return isa;
}

struct Arena {
  void* data = nullptr;
  size_t size = 0;
  ~Arena() { std::free(data); }
};

}  // namespace

int base_of(Isa isa) { return find(kIsas[static_cast<int>(isa)].base); }

bool runs_here() {
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!is_emulated(isa) && available(isa)) return true;
  }
  return false;
}

Isa current_isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

void* thread_scratch(size_t bytes) {
  thread_local Arena arena;
  if (bytes > arena.size) {
    std::free(arena.data);
    arena.size = (bytes + 4095) / 4096 * 4096;
    arena.data = std::aligned_alloc(64, arena.size);
    if (!arena.data) {  // an exception cannot cross the thread pool with its message
      std::abort();
    }
  }
  return arena.data;
}

}  // namespace effvit::cpu

#define EFFVIT_EXPORT extern "C" __attribute__((visibility("default")))

// 0 if `name` is known, compiled and this machine has it; the choice is unchanged otherwise.
EFFVIT_EXPORT int effvit_cpu_set_isa(const char* name) {
  using namespace effvit::cpu;
  const int isa = find(name);
  if (isa < 0 || !available(static_cast<Isa>(isa))) return 1;
  chosen().store(isa);
  return 0;
}

EFFVIT_EXPORT const char* effvit_cpu_isa() {
  const int isa = static_cast<int>(effvit::cpu::current_isa());
  return isa < 0 ? "" : effvit::cpu::kIsas[isa].name;
}

// Comma separated: what the library was compiled for, wherever it is.
EFFVIT_EXPORT const char* effvit_cpu_built_isas() { return EFFVIT_BUILT_ISAS; }

// Comma separated, in the order of isas.h: those of them that this machine has.
EFFVIT_EXPORT const char* effvit_cpu_available_isas() {
  using namespace effvit::cpu;
  static const std::string list = [] {
    std::string s;
    for (int i = 0; i < kIsaCount; ++i) {
      if (available(static_cast<Isa>(i))) s += (s.empty() ? "" : ",") + std::string(kIsas[i].name);
    }
    return s;
  }();
  return list.c_str();
}

#if defined(EFFVIT_PRINT_NATIVE_ISA)
// CMake asks for the best that this machine has.
int main() { return std::puts(effvit::cpu::kIsas[effvit::cpu::best(effvit::cpu::has)].name) < 0; }
#endif
