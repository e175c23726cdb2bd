// Thread and CTA ids, barriers, shuffles and reductions. Collectives need all 32 lanes of a warp.
#pragma once
#include "types.cuh"

namespace effvit {
namespace prim {

constexpr int kWarpSize = 32;

#if defined(EFFVIT_EMU)

EFFVIT_DEVICE int thread_id() { return static_cast<int>(emu::g.thread); }
EFFVIT_DEVICE int64_t cta_id() { return emu::g.cta; }
EFFVIT_DEVICE int64_t cta_count() { return emu::g.ctas; }

EFFVIT_DEVICE void sync_threads(int line = __builtin_LINE()) { emu::barrier(line, false); }
EFFVIT_DEVICE bool sync_threads_or(bool predicate, int line = __builtin_LINE()) {
  return emu::barrier(line, predicate);
}
EFFVIT_DEVICE void sync_warp(int line = __builtin_LINE()) {
  emu::collective(emu::Op::kSyncWarp, line, nullptr, nullptr);
}

template <class T>
EFFVIT_DEVICE T shuffle(T x, int source_lane, int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
  emu::ShuffleArgs args{bit_cast<uint32_t>(x), source_lane, 0};
  emu::collective(emu::Op::kShuffle, line, &args, emu::shuffle);
  return bit_cast<T>(args.result);
}
template <class T>
EFFVIT_DEVICE T shuffle_xor(T x, int lane_mask, int line = __builtin_LINE()) {
  return shuffle(x, (thread_id() % kWarpSize) ^ lane_mask, line);
}
template <class T>  // lane l receives from lane l + delta; the last `delta` lanes keep their own
EFFVIT_DEVICE T shuffle_down(T x, int delta, int line = __builtin_LINE()) {
  const int lane = thread_id() % kWarpSize;
  return shuffle(x, lane + delta < kWarpSize ? lane + delta : lane, line);
}

#else

EFFVIT_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
EFFVIT_DEVICE int64_t cta_id() { return blockIdx.x; }
EFFVIT_DEVICE int64_t cta_count() { return gridDim.x; }

EFFVIT_DEVICE void sync_threads() { __syncthreads(); }
EFFVIT_DEVICE bool sync_threads_or(bool predicate) { return __syncthreads_or(predicate) != 0; }
EFFVIT_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
EFFVIT_DEVICE T shuffle(T x, int source_lane) {
  static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
  return __shfl_sync(0xffffffffu, x, source_lane);
}
template <class T>
EFFVIT_DEVICE T shuffle_xor(T x, int lane_mask) {
  static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
  return __shfl_xor_sync(0xffffffffu, x, lane_mask);
}
template <class T>  // lane l receives from lane l + delta; the last `delta` lanes keep their own
EFFVIT_DEVICE T shuffle_down(T x, int delta) {
  static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
  return __shfl_down_sync(0xffffffffu, x, delta);
}

#endif

EFFVIT_DEVICE int lane_id() { return thread_id() % kWarpSize; }
EFFVIT_DEVICE int warp_id() { return thread_id() / kWarpSize; }

// Over the kLanes neighbouring lanes that differ in the bits below kLanes; every lane gets the same result.
template <int kLanes = kWarpSize>
EFFVIT_DEVICE float warp_sum(float x) {
  EFFVIT_UNROLL
  for (int m = kLanes / 2; m > 0; m /= 2) x += shuffle_xor(x, m);
  return x;
}
template <int kLanes = kWarpSize>
EFFVIT_DEVICE float warp_max(float x) {
  EFFVIT_UNROLL
  for (int m = kLanes / 2; m > 0; m /= 2) {
    const float y = shuffle_xor(x, m);
    x = x > y ? x : y;
  }
  return x;
}

}  // namespace prim
}  // namespace effvit
