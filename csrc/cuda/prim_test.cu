// One kernel per primitive, for tests/prim: the same cases run in the emulator and on a GPU. Not part of effvit_cuda.
#include <cstdio>
#include <exception>
#include <string>

#include "prim/launch.cuh"

namespace effvit {
namespace prim_test {

using namespace prim;

constexpr int kThreads = 64;
constexpr int kHalves = 8;  // 16-bit elements of 16 bytes

EFFVIT_KERNEL(kThreads, 1) ids_kernel(int* out) {  // [ctas, threads, 4]
  int* const to = out + (cta_id() * kThreads + thread_id()) * 4;
  store_global(to, static_cast<int>(cta_id()));
  store_global(to + 1, thread_id());
  store_global(to + 2, warp_id() * 100 + lane_id());
  store_global(to + 3, static_cast<int>(cta_count()));
}

EFFVIT_KERNEL(kThreads, 1) reverse_kernel(const float* in, float* out) {  // [ctas, threads]: each CTA reversed
  const Shared<float> s(0, kThreads);
  const int64_t first = cta_id() * kThreads;
  s.store(thread_id(), load_global(in + first + thread_id()));
  sync_threads();  // reverse
  store_global(out + first + thread_id(), s.load(kThreads - 1 - thread_id()));
}

EFFVIT_KERNEL(kThreads, 1) reverse_warp_kernel(const float* in, float* out) {  // [ctas, threads]: each warp reversed
  const Shared<float> s(0, kThreads);
  const int64_t first = cta_id() * kThreads;
  s.store(thread_id(), load_global(in + first + thread_id()));
  sync_warp();  // reverse_warp
  store_global(out + first + thread_id(), s.load(warp_id() * kWarpSize + kWarpSize - 1 - lane_id()));
}

EFFVIT_KERNEL(kThreads, 1) any_kernel(const int* in, int* out) {  // [ctas, threads] -> [ctas, threads]: OR over the CTA
  const int64_t i = cta_id() * kThreads + thread_id();
  const bool first = sync_threads_or(load_global(in + i) != 0);
  const bool none = sync_threads_or(false);
  store_global(out + i, (first ? 1 : 0) + (none ? 2 : 0));
}

EFFVIT_KERNEL(kThreads, 1) shuffle_kernel(const float* in, float* out) {  // [threads] -> [6, threads]
  const int t = thread_id();
  const float x = load_global(in + t);
  store_global(out + t, shuffle_xor(x, 5));
  store_global(out + kThreads + t, shuffle_down(x, 3));
  store_global(out + 2 * kThreads + t, shuffle(x, (lane_id() * 7 + 3) % kWarpSize));
  store_global(out + 3 * kThreads + t, warp_sum(x));
  store_global(out + 4 * kThreads + t, warp_max(x));
  store_global(out + 5 * kThreads + t, warp_sum<4>(x));
}

// in [32, 8] 16-bit -> out [warp 0, 32 lanes, 4 registers, 2]; the rows lie 24 elements apart.
template <bool kTranspose>
EFFVIT_KERNEL(kThreads, 1)
ldmatrix_kernel(const float16* in, uint32_t* out) {
  constexpr int kStride = 24;
  const Shared<float16> s(0, 32 * kStride);
  if (thread_id() < kWarpSize) {
    for (int c = 0; c < kHalves; ++c) s.store(thread_id() * kStride + c, load_global(in + thread_id() * kHalves + c));
    sync_warp();
    uint32_t r[4];
    ldmatrix_x4<kTranspose>(r, s, lane_id() * kStride);
    for (int i = 0; i < 4; ++i) store_global(out + lane_id() * 4 + i, r[i]);
  }
}

// a [16, 16], b [16, 8] -> out [16, 8] = a b + 1, fragments read straight from memory as mma.cuh describes them.
template <class T>
EFFVIT_KERNEL(kThreads, 1)
mma_kernel(const T* a, const T* b, float* out) {
  if (thread_id() >= kWarpSize) return;
  const int g = lane_id() / 4, t = lane_id() % 4 * 2;
  const auto pair = [](const T* low, const T* high) {
    return static_cast<uint32_t>(load_global(low).bits) | static_cast<uint32_t>(load_global(high).bits) << 16;
  };
  const auto a_pair = [&](int row, int col) { return pair(a + row * 16 + col, a + row * 16 + col + 1); };
  const auto b_pair = [&](int row, int col) { return pair(b + row * 8 + col, b + (row + 1) * 8 + col); };
  const uint32_t af[4] = {a_pair(g, t), a_pair(g + 8, t), a_pair(g, t + 8), a_pair(g + 8, t + 8)};
  float c[4] = {1.f, 1.f, 1.f, 1.f};
  mma_m16n8k16<T>(c, af, b_pair(t, g), b_pair(t + 8, g));
  store_global(out + g * 8 + t, c[0]);
  store_global(out + g * 8 + t + 1, c[1]);
  store_global(out + (g + 8) * 8 + t, c[2]);
  store_global(out + (g + 8) * 8 + t + 1, c[3]);
}

// The same product with fragments through ldmatrix: a stored [m][k] and b stored [k][n].
template <class T>
EFFVIT_KERNEL(kThreads, 1)
mma_ldmatrix_kernel(const T* a, const T* b, float* out) {
  const Shared<T> sa(0, 16 * 24), sb(16 * 24 * 2, 16 * 24);
  const int thread = thread_id();
  for (int i = thread; i < 256; i += kThreads) sa.store(i / 16 * 24 + i % 16, load_global(a + i));
  for (int i = thread; i < 256; i += kThreads)
    sb.store(i / 16 * 24 + i % 16, i % 16 < 8 ? load_global(b + i / 16 * 8 + i % 16) : from_float<T>(0.f));
  sync_threads();  // mma_ldmatrix
  if (thread >= kWarpSize) return;
  uint32_t af[4], bf[4];
  const int low = lane_id() % 8, half = lane_id() / 8 % 2 * 8, quarter = lane_id() / 16 * 8;
  ldmatrix_x4<false>(af, sa, (low + half) * 24 + quarter);
  ldmatrix_x4<true>(bf, sb, (low + half) * 24 + quarter);
  float c[4] = {1.f, 1.f, 1.f, 1.f};
  mma_m16n8k16<T>(c, af, bf[0], bf[1]);
  const int g = lane_id() / 4, t = lane_id() % 4 * 2;
  for (int e = 0; e < 4; ++e) store_global(out + (g + e / 2 * 8) * 8 + t + e % 2, c[e]);
}

// a [16, 32], b [8, 32] -> out [16, 8] = a b^T + 1 of int8, fragments straight from memory, or through ldmatrix.
template <bool kLdmatrix>
EFFVIT_KERNEL(kThreads, 1)
mma_s8_kernel(const int8_t* a, const int8_t* b, int32_t* out) {
  constexpr int kStride = 48;
  using V = Vec<uint32_t, 4>;
  const Shared<int8_t> sa(0, 16 * kStride), sb(16 * kStride, 8 * kStride);
  const int thread = thread_id();
  if (thread < 32) sa.store_vec(thread / 2 * kStride + thread % 2 * 16, load_global_vec<V>(a + thread * 16));
  if (thread < 16) sb.store_vec(thread / 2 * kStride + thread % 2 * 16, load_global_vec<V>(b + thread * 16));
  sync_threads();
  if (thread >= kWarpSize) return;
  const int g = lane_id() / 4, t = lane_id() % 4;
  uint32_t af[4], bf[4];
  if (kLdmatrix) {
    const int low = lane_id() % 8, half = lane_id() / 8 % 2, quarter = lane_id() / 16;
    ldmatrix_x4<false>(af, sa, (low + half * 8) * kStride + quarter * 16);
    ldmatrix_x4<false>(bf, sb, low * kStride + half * 16);  // twice: there are eight rows only
  } else {
    for (int i = 0; i < 4; ++i) af[i] = load_global_vec<uint32_t>(a + (g + i % 2 * 8) * 32 + i / 2 * 16 + t * 4);
    for (int i = 0; i < 2; ++i) bf[i] = load_global_vec<uint32_t>(b + g * 32 + i * 16 + t * 4);
  }
  int32_t c[4] = {1, 1, 1, 1};
  mma_m16n8k32(c, af, bf[0], bf[1]);
  for (int e = 0; e < 4; ++e) store_global(out + (g + e / 2 * 8) * 8 + t * 2 + e % 2, c[e]);
}

// a: values [16, 32], then metadata [16, 8] bytes; b [8, 64] -> out [16, 8] = A b^T + 1 with the sparse A.
template <bool kLdmatrix>
EFFVIT_KERNEL(kThreads, 1)
mma_sp_s8_kernel(const int8_t* a, const int8_t* b, int32_t* out) {
  constexpr int kStride = 80;
  using V = Vec<uint32_t, 4>;
  const Shared<int8_t> sa(0, 16 * kStride), sb(16 * kStride, 8 * kStride);
  const int thread = thread_id();
  if (thread < 32) {
    sa.store_vec(thread / 2 * kStride + thread % 2 * 16, load_global_vec<V>(a + thread * 16));
    sb.store_vec(thread / 4 * kStride + thread % 4 * 16, load_global_vec<V>(b + thread * 16));
  }
  sync_threads();  // mma_sp
  if (thread >= kWarpSize) return;
  const int g = lane_id() / 4, t = lane_id() % 4;
  uint32_t af[4], bf[4];
  if (kLdmatrix) {
    const int low = lane_id() % 8, half = lane_id() / 8 % 2, quarter = lane_id() / 16;
    ldmatrix_x4<false>(af, sa, (low + half * 8) * kStride + quarter * 16);
    ldmatrix_x4<false>(bf, sb, low * kStride + lane_id() / 8 * 16);
  } else {
    for (int i = 0; i < 4; ++i) {
      af[i] = load_global_vec<uint32_t>(a + (g + i % 2 * 8) * 32 + i / 2 * 16 + t * 4);
      bf[i] = load_global_vec<uint32_t>(b + g * 64 + i * 16 + t * 4);
    }
  }
  int32_t c[4] = {1, 1, 1, 1};
  mma_sp_m16n8k64(c, af, bf, load_global_vec<uint32_t>(a + 512 + (g + t % 2 * 8) * 8 + t / 2 * 4));
  for (int e = 0; e < 4; ++e) store_global(out + (g + e / 2 * 8) * 8 + t * 2 + e % 2, c[e]);
}

// in [2, threads, 16] bytes; thread t copies t % 17 bytes of each, zero filled -> out like in.
EFFVIT_KERNEL(kThreads, 1) cp_async_kernel(const uint8_t* in, uint8_t* out) {
  using V = Vec<uint32_t, 4>;
  const Shared<uint8_t> s(0, 2 * kThreads * 16);
  const int t = thread_id();
  for (int group = 0; group < 2; ++group) {
    cp_async16(s, (group * kThreads + t) * 16, in + (group * kThreads + t) * 16, t % 17);
    cp_async_commit();
  }
  cp_async_wait<1>();  // first group
  sync_threads();
  const int other = kThreads - 1 - t;
  store_global_vec(out + other * 16, s.load_vec<V>(other * 16));
  cp_async_wait<0>();  // second group
  sync_threads();
  store_global_vec(out + (kThreads + other) * 16, s.load_vec<V>((kThreads + other) * 16));
}

// in [threads] -> out [threads, 6] as bits: float16, bfloat16, the pairs of both, and both back as float32.
EFFVIT_KERNEL(kThreads, 1) convert_kernel(const float* in, uint32_t* out) {
  const float x = load_global(in + thread_id()), y = load_global(in + kThreads - 1 - thread_id());
  const auto h = from_float<float16>(x);
  const auto b = from_float<bfloat16>(x);
  uint32_t* const to = out + thread_id() * 6;
  store_global(to, static_cast<uint32_t>(h.bits));
  store_global(to + 1, static_cast<uint32_t>(b.bits));
  store_global(to + 2, pack2<float16>(x, y));
  store_global(to + 3, pack2<bfloat16>(x, y));
  store_global(to + 4, bit_cast<uint32_t>(to_float(h)));
  store_global(to + 5, bit_cast<uint32_t>(to_float(b)));
}

EFFVIT_KERNEL(kThreads, 1) math_kernel(const float* in, float* out) {  // [threads] > 0 -> [4, threads]
  const float x = load_global(in + thread_id());
  store_global(out + thread_id(), prim::exp2(-x));
  store_global(out + kThreads + thread_id(), prim::exp(-x));
  store_global(out + 2 * kThreads + thread_id(), prim::log(x));
  store_global(out + 3 * kThreads + thread_id(), prim::sqrt(x));
}

EFFVIT_KERNEL(kThreads, 1) round_kernel(const float* in, int32_t* out) {  // [threads] -> [threads]
  store_global(out + thread_id(), round_to_int(load_global(in + thread_id())));
}

// x, y [threads] as bits -> [2, threads]: x shifted by y, bytes of both by the digits of x.
EFFVIT_KERNEL(kThreads, 1) bits_kernel(const uint32_t* x, const uint32_t* y, uint32_t* out) {
  const uint32_t a = load_global(x + thread_id()), b = load_global(y + thread_id());
  store_global(out + thread_id(), shift_right(a, b));
  store_global(out + kThreads + thread_id(), permute_bytes(a, b, a & 0x7777u));
}

// x [2, threads], y [threads] -> [threads]: x0 x1 + y, rounded twice.
EFFVIT_KERNEL(kThreads, 1) product_kernel(const float* x, const float* y, float* out) {
  const float p = product(load_global(x + thread_id()), load_global(x + kThreads + thread_id()));
  store_global(out + thread_id(), p + load_global(y + thread_id()));
}

#if defined(EFFVIT_EMU)
enum Fault : int {
  kSharedOverrun,
  kSharedUnderrun,
  kSharedMisaligned,
  kSharedUninitialised,
  kRace,
  kWarpRace,
  kGlobalOverrun,
  kGlobalMisaligned,
  kWriteInput,
  kWriteTwice,
  kLeaveHole,
  kDivergentBarrier,
  kBarrierAfterExit,
  kDivergentCollective,
  kCollectiveAfterExit,
  kReadInFlight,
  kNeverWaited
};

// Each fault is undefined behaviour on a GPU; the emulator must report it. out [threads] is written once without one.
EFFVIT_KERNEL(kThreads, 1) fault_kernel(const float* in, float* out, int fault) {
  const int t = thread_id();
  const Shared<float> s(0, kThreads + 4), half(0, kThreads);
  s.store(t, load_global(in + t));
  if (fault == kSharedOverrun && t == kThreads - 1) half.store(t + 1, 0.f);
  if (fault == kSharedUnderrun && t == 0) s.load(-1);
  if (fault == kSharedMisaligned) s.load_vec<Vec<float, 2>>(t | 1);
  if (fault == kSharedUninitialised && t == 5) s.load(kThreads);
  if (fault == kRace) s.load(kThreads - 1 - t);
  if (fault == kWarpRace) s.load(t ^ 1);
  if (fault == kGlobalOverrun && t == 3) load_global(in + kThreads);
  if (fault == kGlobalMisaligned) load_global_vec<Vec<float, 4>>(in + 1);
  if (fault == kWriteInput) store_global(const_cast<float*>(in) + t, 0.f);
  if (fault == kWriteTwice) store_global(out + t, 0.f);
  if (fault == kDivergentBarrier) {
    if (t < 32) {
      sync_threads();
    } else {
      s.store(t, 0.f);
      sync_threads();
    }
  }
  if (fault == kBarrierAfterExit && t == 40) return;
  if (fault == kDivergentCollective) (t % 2 == 0 ? (void)warp_sum(1.f) : sync_warp());
  if (fault == kCollectiveAfterExit) {
    if (t == 7) return;
    sync_warp();
  }
  if (fault == kReadInFlight || fault == kNeverWaited) {
    if (t == 0) cp_async16(s, kThreads, in, 16);
    cp_async_commit();
    if (fault == kReadInFlight) {
      if (t == 0) s.load(kThreads);
      cp_async_wait<0>();
    }
  }
  sync_threads();
  if (fault == kLeaveHole && t == 9) return;
  store_global(out + t, s.load(kThreads - 1 - t));
}
#endif

cudaError_t run(const std::string& name, const void* a, const void* b, void* out, int argument, cudaStream_t stream) {
#define EFFVIT_CASE(kernel, ctas, shared, ...) \
  if (name == #kernel) return EFFVIT_LAUNCH((kernel##_kernel), ctas, kThreads, shared, stream, __VA_ARGS__)
#define EFFVIT_TYPED_CASE(label, kernel, shared, ...) \
  if (name == label) return EFFVIT_LAUNCH((kernel), 1, kThreads, shared, stream, __VA_ARGS__)
  const auto* fa = static_cast<const float*>(a);
  auto* fo = static_cast<float*>(out);
  EFFVIT_CASE(ids, 3, 0, static_cast<int*>(out));
  EFFVIT_CASE(reverse, 3, kThreads * 4, fa, fo);
  EFFVIT_CASE(reverse_warp, 3, kThreads * 4, fa, fo);
  EFFVIT_CASE(any, 3, 0, static_cast<const int*>(a), static_cast<int*>(out));
  EFFVIT_CASE(shuffle, 1, 0, fa, fo);
  EFFVIT_CASE(cp_async, 1, 2 * kThreads * 16, static_cast<const uint8_t*>(a), static_cast<uint8_t*>(out));
  EFFVIT_CASE(convert, 1, 0, fa, static_cast<uint32_t*>(out));
  EFFVIT_CASE(math, 1, 0, fa, fo);
  const auto *ua = static_cast<const uint32_t*>(a), *ub = static_cast<const uint32_t*>(b);
  EFFVIT_CASE(bits, 1, 0, ua, ub, static_cast<uint32_t*>(out));
  EFFVIT_CASE(product, 1, 0, fa, static_cast<const float*>(b), fo);
  EFFVIT_CASE(round, 1, 0, fa, static_cast<int32_t*>(out));
  const auto *ha = static_cast<const float16*>(a), *hb = static_cast<const float16*>(b);
  const auto *ia = static_cast<const int8_t*>(a), *ib = static_cast<const int8_t*>(b);
  const auto *ba = static_cast<const bfloat16*>(a), *bb = static_cast<const bfloat16*>(b);
  EFFVIT_TYPED_CASE("ldmatrix", ldmatrix_kernel<false>, 32 * 24 * 2, ha, static_cast<uint32_t*>(out));
  EFFVIT_TYPED_CASE("ldmatrix_trans", ldmatrix_kernel<true>, 32 * 24 * 2, ha, static_cast<uint32_t*>(out));
  EFFVIT_TYPED_CASE("mma_f16", mma_kernel<float16>, 0, ha, hb, fo);
  EFFVIT_TYPED_CASE("mma_bf16", mma_kernel<bfloat16>, 0, ba, bb, fo);
  EFFVIT_TYPED_CASE("mma_ldmatrix_f16", mma_ldmatrix_kernel<float16>, 2 * 16 * 24 * 2, ha, hb, fo);
  EFFVIT_TYPED_CASE("mma_ldmatrix_bf16", mma_ldmatrix_kernel<bfloat16>, 2 * 16 * 24 * 2, ba, bb, fo);
  EFFVIT_TYPED_CASE("mma_s8", mma_s8_kernel<false>, 24 * 48, ia, ib, static_cast<int32_t*>(out));
  EFFVIT_TYPED_CASE("mma_ldmatrix_s8", mma_s8_kernel<true>, 24 * 48, ia, ib, static_cast<int32_t*>(out));
  EFFVIT_TYPED_CASE("mma_sp_s8", mma_sp_s8_kernel<false>, 24 * 80, ia, ib, static_cast<int32_t*>(out));
  EFFVIT_TYPED_CASE("mma_sp_ldmatrix_s8", mma_sp_s8_kernel<true>, 24 * 80, ia, ib, static_cast<int32_t*>(out));
#if defined(EFFVIT_EMU)
  EFFVIT_CASE(fault, 1, (kThreads + 4) * 4, fa, fo, argument);
#else
  (void)argument;
#endif
#undef EFFVIT_CASE
#undef EFFVIT_TYPED_CASE
  return static_cast<cudaError_t>(1);
}

}  // namespace prim_test
}  // namespace effvit

// Runs one case; `message` (of `size` bytes) receives what went wrong, or stays empty.
extern "C" __attribute__((visibility("default"))) void effvit_prim_test(const char* name, const void* a,
                                                                        int64_t a_bytes, const void* b, int64_t b_bytes,
                                                                        void* out, int64_t out_bytes, int argument,
                                                                        char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  try {
    prim::GlobalRanges ranges;
    ranges.read(a, static_cast<uint64_t>(a_bytes));
    ranges.read(b, static_cast<uint64_t>(b_bytes));
    ranges.write_once(out, static_cast<uint64_t>(out_bytes));
    const cudaError_t error = prim_test::run(name, a, b, out, argument, nullptr);
    if (error != cudaSuccess) std::snprintf(message, static_cast<size_t>(size), "%s", cudaGetErrorString(error));
    ranges.finish();
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
