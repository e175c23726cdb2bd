// The switch behind small_tiles(). Compiled for the baseline.
#include "tiles.h"

#include <atomic>

namespace effvit::cpu {
namespace {
std::atomic<bool> small{false};
}  // namespace

bool small_tiles() { return small.load(std::memory_order_relaxed); }

}  // namespace effvit::cpu

// For tests. Returns what was set before.
extern "C" __attribute__((visibility("default"))) int effvit_cpu_set_small_tiles(int on) {
  return effvit::cpu::small.exchange(on != 0);
}
