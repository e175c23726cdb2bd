// Runs CUDA kernels written on cuda/prim on the CPU: one thread is one fiber. Used by tests only.
//
// CTAs run one after the other. A warp collective computes when its last lane arrives; a barrier releases when the last
// thread of the CTA arrives. Every shared and global access is checked: bounds, alignment, uninitialised or still in
// flight (cp.async) shared memory, and unordered accesses of two threads to one shared word. A finding throws.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

namespace effvit {
namespace emu {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;

// Shared memory is tracked in granules of two bytes, the smallest element the kernels store.
struct Granule {
  uint32_t write_epoch, read_epoch;  // CTA barrier epoch of the last write and read; 0: never
  uint32_t write_sync, read_sync;  // the warp's __syncwarp count at that time
  uint16_t writer, reader;  // thread, kMany for several lanes of one warp
  uint16_t read_warp, pad;  // warp, kMany for several
};
constexpr uint16_t kMany = 0xffff;

struct State {
  uint8_t* shared = nullptr;
  Granule* granules = nullptr;
  uint32_t shared_bytes = 0;
  uint32_t epoch = 1, first_epoch = 1;  // first_epoch: of this CTA
  uint32_t thread = 0, warp = 0;  // the running one
  uint32_t threads = 0;
  uint32_t warp_sync[kMaxThreads / kWarpSize] = {};
  int64_t cta = 0, ctas = 0;
};
extern State g;

[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail_shared_bounds(uint64_t offset, uint32_t bytes);
[[noreturn]] void fail_shared_alignment(uint64_t offset, uint32_t bytes);
[[noreturn]] void fail_shared_uninitialised(uint64_t offset);
[[noreturn]] void fail_shared_race(uint64_t offset, const char* kind, unsigned other);

// An access of the running thread to shared memory: bounds, alignment, initialisation, races.
void note_read(uint64_t offset, uint32_t bytes, uint32_t align);
void note_write(uint64_t offset, uint32_t bytes, uint32_t align, bool in_flight = false);

// Global memory: only registered ranges may be touched; an output registered with `once` must be written exactly once.
// begin_ranges locks the emulator for the calling OS thread until end_ranges.
void begin_ranges();
void add_range(const void* p, uint64_t bytes, bool writable, bool once);
void end_ranges(bool check_outputs);
void check_global(const void* p, uint32_t bytes, uint32_t align, bool write);

enum class Op : int { kShuffle, kLdmatrix, kMma, kSyncWarp };
// Blocks until all 32 lanes arrived; the last one runs compute on the arguments of all lanes.
void collective(Op op, int line, void* args, void (*compute)(void** lane_args));
// Blocks until all threads of the CTA arrived; returns the OR of their predicates.
bool barrier(int line, bool predicate);

void cp_async16(uint64_t shared_offset, const void* global, uint32_t bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);

struct ShuffleArgs {
  uint32_t value;
  int source;  // lane
  uint32_t result;
};
void shuffle(void** lanes);

struct LdmatrixArgs {
  uint64_t row;  // byte offset in shared memory
  bool transpose;
  uint32_t result[4];
};
void ldmatrix(void** lanes);

struct MmaArgs {
  const uint32_t* a;
  const uint32_t* b;
  float* c;
};
void mma_bf16(void** lanes);
void mma_f16(void** lanes);

struct MmaInt8Args {
  const uint32_t* a;
  const uint32_t* b;
  int32_t* c;
};
void mma_s8(void** lanes);

struct MmaSparseArgs {
  const uint32_t* a;
  const uint32_t* b;
  int32_t* c;
  uint32_t metadata;
};
void mma_sp_s8(void** lanes);

float half_to_float(uint16_t h);
uint16_t float_to_half(float f);
int32_t float_to_int(float f);  // to the nearest, ties to even, saturating; NaN gives 0

// What kernels plan with in place of a GPU's numbers. effvit_emu_set_limits changes both, for tests.
int64_t target_ctas();  // 6: few CTAs, so that each of them walks several tiles
int64_t max_shared_bytes();  // 99 KiB: below what the largest tiles would take, so that operands are streamed

// Serialises launches and runs every CTA.
void launch(const char* name, int64_t ctas, int threads, int64_t shared_bytes, const std::function<void()>& body);

}  // namespace emu
}  // namespace effvit
