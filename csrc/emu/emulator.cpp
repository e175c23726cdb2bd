// The CPU emulator of the CUDA primitives: fibers, warp collectives, barriers, cp.async, memory checks, launch
// counters.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace effvit {
namespace emu {

State g;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;

enum class Status : uint8_t { kReady, kCollective, kBarrier, kDone };

struct Copy {
  uint64_t shared;
  const void* global;
  uint32_t bytes;
};

#if defined(__x86_64__)
using Context = void*;  // the saved stack pointer
extern "C" void effvit_emu_switch(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden effvit_emu_switch
.globl effvit_emu_switch
.type effvit_emu_switch, @function
effvit_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size effvit_emu_switch, .-effvit_emu_switch
)");
void switch_context(Context& save, Context& load) { effvit_emu_switch(&save, load); }
void make_context(Context& context, uint8_t* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // the entry must see a stack pointer that is 8 modulo 16
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
void switch_context(Context& save, Context& load) { swapcontext(&save, &load); }
void make_context(Context& context, uint8_t* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

struct Fiber {
  Context context;
  Status status;
  Op op;
  int line;
  bool predicate;
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
};

struct Warp {
  uint32_t ready = 0;  // by position in `order`
  uint8_t order[kWarpSize];  // position -> lane
  uint8_t position[kWarpSize];
  int arrived = 0;
  void* args[kWarpSize];
};

struct Range {
  uintptr_t begin, end;
  bool writable, once;
  std::vector<uint8_t> written;  // per byte
};

std::recursive_mutex launch_mutex;
std::map<std::string, int64_t> counters;
uint64_t seed = 0;
constexpr int kTargetCtas = 6, kMaxSharedBytes = 99 * 1024;
std::atomic<int> target_cta_limit{kTargetCtas}, shared_byte_limit{kMaxSharedBytes};
uint64_t rng = 0;

Fiber fibers[kMaxThreads];
Warp warps[kMaxWarps];
uint8_t warp_order[kMaxWarps], warp_position[kMaxWarps];
int warp_count = 0;
int at_barrier = 0, done = 0;
bool barrier_or = false;  // of the threads that arrived
bool barrier_result = false;  // of the last released barrier
Context scheduler;
std::exception_ptr error;
const std::function<void()>* kernel_body = nullptr;
const char* kernel_name = "";
uint8_t* stacks = nullptr;
std::vector<uint8_t> shared_storage;
std::vector<Granule> granule_storage;
std::vector<Range> ranges;
size_t last_range = 0;

uint64_t next_random() {
  rng ^= rng << 13;
  rng ^= rng >> 7;
  rng ^= rng << 17;
  return rng;
}

// A new order of warps and lanes; with seed 0 the natural one.
void reorder() {
  for (int w = 0; w < warp_count; ++w) warp_order[w] = static_cast<uint8_t>(w);
  if (seed != 0) {
    for (int w = warp_count - 1; w > 0; --w) std::swap(warp_order[w], warp_order[next_random() % (w + 1)]);
  }
  for (int w = 0; w < warp_count; ++w) warp_position[warp_order[w]] = static_cast<uint8_t>(w);
  for (int w = 0; w < warp_count; ++w) {
    Warp& warp = warps[w];
    for (int l = 0; l < kWarpSize; ++l) warp.order[l] = static_cast<uint8_t>(l);
    if (seed != 0) {
      for (int l = kWarpSize - 1; l > 0; --l) std::swap(warp.order[l], warp.order[next_random() % (l + 1)]);
    }
    for (int l = 0; l < kWarpSize; ++l) warp.position[warp.order[l]] = static_cast<uint8_t>(l);
  }
}

const char* op_name(Op op) {
  switch (op) {
    case Op::kShuffle:
      return "shuffle";
    case Op::kLdmatrix:
      return "ldmatrix";
    case Op::kMma:
      return "mma";
    case Op::kSyncWarp:
      return "syncwarp";
  }
  return "?";
}

std::string where() {
  return std::string(" (kernel ") + kernel_name + ", CTA " + std::to_string(g.cta) + ", thread " +
         std::to_string(g.thread) + ")";
}

std::string describe(int thread) {
  const Fiber& f = fibers[thread];
  const std::string who = "thread " + std::to_string(thread);
  if (f.status == Status::kDone) return who + " has returned";
  if (f.status == Status::kBarrier) return who + " is at the barrier in line " + std::to_string(f.line);
  if (f.status == Status::kCollective)
    return who + " is at the " + op_name(f.op) + " in line " + std::to_string(f.line);
  return who + " is running";
}

std::string divergence() {
  for (uint32_t t = 0; t < g.threads; ++t) {
    for (uint32_t u = t + 1; u < g.threads; ++u) {
      const Fiber &a = fibers[t], &b = fibers[u];
      if (a.status != b.status || (a.status != Status::kDone && a.line != b.line))
        return describe(static_cast<int>(t)) + ", " + describe(static_cast<int>(u));
    }
  }
  return "no thread can run";
}

void resume(uint32_t thread, Context& save) {
  g.thread = thread;
  g.warp = thread / kWarpSize;
  switch_context(save, fibers[thread].context);
}

// The next thread that can run, starting with the running one's warp; -1 if none can.
int pick() {
  const int start = warp_position[g.warp];
  for (int i = 0; i < warp_count; ++i) {
    int p = start + i;
    if (p >= warp_count) p -= warp_count;
    Warp& warp = warps[warp_order[p]];
    if (warp.ready != 0) return warp_order[p] * kWarpSize + warp.order[__builtin_ctz(warp.ready)];
  }
  return -1;
}

void set_ready(uint32_t thread) {
  Warp& warp = warps[thread / kWarpSize];
  fibers[thread].status = Status::kReady;
  warp.ready |= 1u << warp.position[thread % kWarpSize];
}

void block(uint32_t thread, Status status) {
  Warp& warp = warps[thread / kWarpSize];
  fibers[thread].status = status;
  warp.ready &= ~(1u << warp.position[thread % kWarpSize]);
}

void release_barrier() {
  at_barrier = 0;
  barrier_result = barrier_or;
  if (++g.epoch == 0) fail("more than 2^32 barriers");
  reorder();
  for (int w = 0; w < warp_count; ++w) warps[w].ready = 0;
  for (uint32_t t = 0; t < g.threads; ++t) set_ready(t);
}

// Gives the processor away. Returns when this thread runs again.
void yield() {
  const uint32_t me = g.thread;
  int next = pick();
  if (next < 0) {
    if (at_barrier == static_cast<int>(g.threads)) {
      for (uint32_t t = 1; t < g.threads; ++t) {
        if (fibers[t].line != fibers[0].line) fail("divergent barrier: " + divergence());
      }
      release_barrier();
      next = pick();
    } else if (at_barrier + done == static_cast<int>(g.threads)) {
      fail("divergent barrier: " + divergence());
    } else {
      fail("divergent warp collective: " + divergence());
    }
  }
  if (static_cast<uint32_t>(next) != me) resume(static_cast<uint32_t>(next), fibers[me].context);
}

void fiber_main() {
  const uint32_t me = g.thread;
  try {
    (*kernel_body)();
    if (!fibers[me].open.empty() || !fibers[me].groups.empty()) fail("a thread returned before its cp.async landed");
    block(me, Status::kDone);
    ++done;
    if (done < static_cast<int>(g.threads)) yield();
  } catch (...) {
    error = std::current_exception();
  }
  switch_context(fibers[me].context, scheduler);
  std::abort();  // a finished fiber is never resumed
}

void allocate_stacks() {
  if (stacks != nullptr) return;
  void* p = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  stacks = static_cast<uint8_t*>(p);
  for (int t = 0; t < kMaxThreads; ++t) mprotect(stacks + kStackBytes * t, 4096, PROT_NONE);  // guard page
}

void run_cta(int64_t cta) {
  g.cta = cta;
  ++g.epoch;
  g.first_epoch = g.epoch;
  if (g.shared_bytes != 0) std::memset(g.shared, 0xff, g.shared_bytes);  // NaN in every float type
  at_barrier = done = 0;
  reorder();
  for (int w = 0; w < warp_count; ++w) {
    warps[w].ready = 0;
    warps[w].arrived = 0;
    g.warp_sync[w] = 0;
  }
  for (uint32_t t = 0; t < g.threads; ++t) {
    fibers[t].groups.clear();
    fibers[t].open.clear();
    make_context(fibers[t].context, stacks + kStackBytes * t, fiber_main);
    set_ready(t);
  }
  error = nullptr;
  g.warp = warp_order[0];
  resume(static_cast<uint32_t>(pick()), scheduler);
  if (error) std::rethrow_exception(error);
}

}  // namespace

void fail(const std::string& what) { throw std::runtime_error("emulator: " + what + where()); }

void fail_shared_bounds(uint64_t offset, uint32_t bytes) {
  fail("shared memory access of " + std::to_string(bytes) + " bytes at offset " +
       std::to_string(static_cast<int64_t>(offset)) + " is outside the array or the " + std::to_string(g.shared_bytes) +
       " bytes of the CTA");
}

void fail_shared_alignment(uint64_t offset, uint32_t bytes) {
  fail("shared memory access at offset " + std::to_string(offset) + " is not aligned to " + std::to_string(bytes));
}

void fail_shared_uninitialised(uint64_t offset) {
  fail("read of uninitialised shared memory, or of a cp.async before its wait, at offset " + std::to_string(offset));
}

void fail_shared_race(uint64_t offset, const char* kind, unsigned other) {
  const std::string who = other == kMany ? "other lanes" : "thread " + std::to_string(other);
  fail(std::string("shared memory race at offset ") + std::to_string(offset) + ": " + kind + " " + who +
       " without a barrier in between");
}

static void check_shared_span(uint64_t offset, uint32_t bytes, uint32_t align) {
  if (offset + bytes > g.shared_bytes) fail_shared_bounds(offset, bytes);
  if (offset % align != 0) fail_shared_alignment(offset, align);
}

// True if thread `other` of the running thread's warp is ordered before it by a __syncwarp, or is the thread itself.
static bool ordered_in_warp(uint16_t other, uint32_t other_sync) {
  if (other == g.thread) return true;
  if (other != kMany && other / kWarpSize != g.warp) return false;
  return g.warp_sync[g.warp] > other_sync;
}

void note_read(uint64_t offset, uint32_t bytes, uint32_t align) {
  check_shared_span(offset, bytes, align);
  Granule* cell = g.granules + offset / 2;
  for (uint32_t n = (bytes + 1) / 2; n-- != 0; ++cell) {
    if (cell->write_epoch < g.first_epoch) fail_shared_uninitialised(static_cast<uint64_t>(cell - g.granules) * 2);
    if (cell->write_epoch == g.epoch && !ordered_in_warp(cell->writer, cell->write_sync))
      fail_shared_race(static_cast<uint64_t>(cell - g.granules) * 2, "reads what was written by", cell->writer);
    if (cell->read_epoch != g.epoch) {
      cell->read_epoch = g.epoch;
      cell->read_warp = static_cast<uint16_t>(g.warp);
      cell->reader = static_cast<uint16_t>(g.thread);
    } else {
      if (cell->read_warp != g.warp) cell->read_warp = kMany;
      // Of reads before a __syncwarp, those of this warp no longer count.
      if (cell->reader != g.thread)
        cell->reader = ordered_in_warp(cell->reader, cell->read_sync) ? static_cast<uint16_t>(g.thread) : kMany;
    }
    cell->read_sync = g.warp_sync[g.warp];
  }
}

void note_write(uint64_t offset, uint32_t bytes, uint32_t align, bool in_flight) {
  check_shared_span(offset, bytes, align);
  Granule* cell = g.granules + offset / 2;
  for (uint32_t n = (bytes + 1) / 2; n-- != 0; ++cell) {
    if (cell->write_epoch == g.epoch && !ordered_in_warp(cell->writer, cell->write_sync))
      fail_shared_race(static_cast<uint64_t>(cell - g.granules) * 2, "overwrites what was written by", cell->writer);
    if (cell->read_epoch == g.epoch && (cell->read_warp != g.warp || !ordered_in_warp(cell->reader, cell->read_sync)))
      fail_shared_race(static_cast<uint64_t>(cell - g.granules) * 2, "overwrites what is read by", cell->reader);
    cell->write_epoch = in_flight ? 0 : g.epoch;
    cell->write_sync = g.warp_sync[g.warp];
    cell->writer = static_cast<uint16_t>(g.thread);
  }
}

int64_t target_ctas() { return target_cta_limit; }
int64_t max_shared_bytes() { return shared_byte_limit; }

void begin_ranges() { launch_mutex.lock(); }

void add_range(const void* p, uint64_t bytes, bool writable, bool once) {
  if (p == nullptr || bytes == 0) return;
  Range r{reinterpret_cast<uintptr_t>(p), reinterpret_cast<uintptr_t>(p) + bytes, writable, once, {}};
  if (once) {
    r.written.assign(bytes, 0);
    std::memset(const_cast<void*>(p), 0xff, bytes);
  }
  ranges.push_back(std::move(r));
}

void end_ranges(bool check_outputs) {
  std::vector<Range> all;
  all.swap(ranges);
  last_range = 0;
  launch_mutex.unlock();
  if (!check_outputs) return;
  for (const Range& r : all) {
    if (!r.once) continue;
    const auto it = std::find(r.written.begin(), r.written.end(), 0);
    if (it != r.written.end())
      throw std::runtime_error("emulator: kernel " + std::string(kernel_name) + " left byte " +
                               std::to_string(it - r.written.begin()) + " of an output of " +
                               std::to_string(r.end - r.begin) + " bytes unwritten");
  }
}

void check_global(const void* p, uint32_t bytes, uint32_t align, bool write) {
  const auto a = reinterpret_cast<uintptr_t>(p);
  if (a % align != 0) fail("global memory access is not aligned to " + std::to_string(align));
  for (size_t i = 0, n = ranges.size(); i < n; ++i) {
    size_t at = last_range + i;
    if (at >= n) at -= n;
    Range& r = ranges[at];
    if (a < r.begin || a + bytes > r.end || (write && !r.writable)) continue;
    last_range = at;
    if (write && r.once) {
      for (uintptr_t o = a - r.begin; o < a + bytes - r.begin; ++o) {
        if (r.written[o]) fail("an output element is written twice");
        r.written[o] = 1;
      }
    }
    return;
  }
  fail(std::string("global memory ") + (write ? "write" : "read") + " of " + std::to_string(bytes) +
       " bytes is outside every registered tensor");
}

void collective(Op op, int line, void* args, void (*compute)(void**)) {
  const uint32_t me = g.thread;
  Warp& warp = warps[me / kWarpSize];
  Fiber& self = fibers[me];
  self.op = op;
  self.line = line;
  warp.args[me % kWarpSize] = args;
  if (++warp.arrived < kWarpSize) {
    block(me, Status::kCollective);
    yield();
    return;
  }
  const uint32_t first = me / kWarpSize * kWarpSize;
  self.status = Status::kCollective;
  for (uint32_t t = first; t < first + kWarpSize; ++t) {
    if (fibers[t].op != op || fibers[t].line != line)
      fail("divergent warp collective: " + describe(static_cast<int>(t)) + ", " + describe(static_cast<int>(me)));
  }
  warp.arrived = 0;
  if (compute != nullptr) compute(warp.args);
  if (op == Op::kSyncWarp) ++g.warp_sync[me / kWarpSize];
  for (uint32_t t = first; t < first + kWarpSize; ++t) set_ready(t);
}

bool barrier(int line, bool predicate) {
  Fiber& self = fibers[g.thread];
  self.line = line;
  barrier_or = at_barrier == 0 ? predicate : barrier_or || predicate;
  ++at_barrier;
  block(g.thread, Status::kBarrier);
  yield();
  return barrier_result;
}

void cp_async16(uint64_t shared_offset, const void* global, uint32_t bytes) {
  note_write(shared_offset, 16, 16, true);
  if (bytes > 16) fail("cp.async of more than 16 bytes");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("cp.async source is not aligned to 16");
  if (bytes != 0) check_global(global, bytes, 16, false);
  std::memset(g.shared + shared_offset, 0xff, 16);
  fibers[g.thread].open.push_back({shared_offset, global, bytes});
}

void cp_async_commit() {
  Fiber& self = fibers[g.thread];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void cp_async_wait(int groups_left) {
  Fiber& self = fibers[g.thread];
  while (self.groups.size() > static_cast<size_t>(groups_left)) {
    for (const Copy& c : self.groups.front()) {
      note_write(c.shared, 16, 16);
      std::memset(g.shared + c.shared, 0, 16);
      std::memcpy(g.shared + c.shared, c.global, c.bytes);
    }
    self.groups.pop_front();
  }
}

void shuffle(void** lanes) {
  for (int l = 0; l < kWarpSize; ++l) {
    auto& args = *static_cast<ShuffleArgs*>(lanes[l]);
    if (args.source < 0 || args.source >= kWarpSize) fail("shuffle from lane " + std::to_string(args.source));
    args.result = static_cast<ShuffleArgs*>(lanes[args.source])->value;
  }
}

void ldmatrix(void** lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t tile[8][8];
    for (int r = 0; r < 8; ++r) {
      const uint64_t row = static_cast<LdmatrixArgs*>(lanes[matrix * 8 + r])->row;
      note_read(row, 16, 16);
      std::memcpy(tile[r], g.shared + row, 16);
    }
    for (int l = 0; l < kWarpSize; ++l) {
      auto& args = *static_cast<LdmatrixArgs*>(lanes[l]);
      const int i = l / 4, j = l % 4 * 2;
      const uint16_t lo = args.transpose ? tile[j][i] : tile[i][j];
      const uint16_t hi = args.transpose ? tile[j + 1][i] : tile[i][j + 1];
      args.result[matrix] = static_cast<uint32_t>(lo) | static_cast<uint32_t>(hi) << 16;
    }
  }
}

void launch(const char* name, int64_t ctas, int threads, int64_t shared_bytes, const std::function<void()>& body) {
  const std::lock_guard<std::recursive_mutex> lock(launch_mutex);
  std::string text(name);
  while (!text.empty() && (text[0] == '(' || text[0] == ' ')) text.erase(0, 1);
  text = text.substr(0, text.find_first_of("<() "));
  if (ctas < 1 || ctas > 0x7fffffff)
    throw std::runtime_error("emulator: " + text + ": grid of " + std::to_string(ctas));
  if (threads < 1 || threads > kMaxThreads || threads % kWarpSize != 0)
    throw std::runtime_error("emulator: " + text + ": CTA of " + std::to_string(threads) + " threads");
  if (shared_bytes < 0 || shared_bytes > 227 * 1024)
    throw std::runtime_error("emulator: " + text + ": " + std::to_string(shared_bytes) + " bytes of shared memory");
  const auto it = counters.emplace(text, 0).first;
  ++it->second;
  kernel_name = it->first.c_str();
  static const bool from_environment = [] {
    const char* s = std::getenv("EFFVIT_EMU_SEED");
    if (s != nullptr && seed == 0) seed = std::strtoull(s, nullptr, 10);
    return true;
  }();
  (void)from_environment;
  rng = seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
  allocate_stacks();
  const auto bytes = static_cast<size_t>(shared_bytes);
  if (shared_storage.size() < bytes + 16) {
    shared_storage.resize(bytes + 16);
    granule_storage.assign(bytes / 2 + 16, Granule{});
  }
  g.shared = shared_storage.data() + (16 - reinterpret_cast<uintptr_t>(shared_storage.data()) % 16) % 16;
  g.granules = granule_storage.data();
  g.shared_bytes = static_cast<uint32_t>(bytes);
  g.threads = static_cast<uint32_t>(threads);
  g.ctas = ctas;
  warp_count = threads / kWarpSize;
  kernel_body = &body;
  // With a seed the CTAs run in another order: a rotation and, for odd seeds, backwards.
  const int64_t start = seed == 0 ? 0 : static_cast<int64_t>(next_random() % static_cast<uint64_t>(ctas));
  for (int64_t i = 0; i < ctas; ++i) {
    const int64_t c = (start + i) % ctas;
    run_cta(seed % 2 == 1 ? ctas - 1 - c : c);
  }
}

}  // namespace emu
}  // namespace effvit

#define EFFVIT_EXPORT extern "C" __attribute__((visibility("default")))

// The order of threads and CTAs of the launches that follow; 0 is the natural one.
EFFVIT_EXPORT void effvit_emu_set_seed(uint64_t value) {
  const std::lock_guard<std::recursive_mutex> lock(effvit::emu::launch_mutex);
  effvit::emu::seed = value;
}

// The two numbers that plans are made with; 0 stands for the default. They choose between plans that are all right: a
// kernel that has no smaller one takes the shared memory it needs. Whoever asks for a workspace and launches must do
// both under the same limits.
EFFVIT_EXPORT void effvit_emu_set_limits(int target_ctas, int max_shared_bytes) {
  effvit::emu::target_cta_limit = target_ctas > 0 ? target_ctas : effvit::emu::kTargetCtas;
  effvit::emu::shared_byte_limit = max_shared_bytes > 0 ? max_shared_bytes : effvit::emu::kMaxSharedBytes;
}

EFFVIT_EXPORT int64_t effvit_emu_launch_count(const char* kernel) {
  const std::lock_guard<std::recursive_mutex> lock(effvit::emu::launch_mutex);
  const auto it = effvit::emu::counters.find(kernel);
  return it == effvit::emu::counters.end() ? 0 : it->second;
}

EFFVIT_EXPORT void effvit_emu_reset_counters() {
  const std::lock_guard<std::recursive_mutex> lock(effvit::emu::launch_mutex);
  effvit::emu::counters.clear();
}

// Names of the launched kernels, comma separated. The text stays valid until the next call.
EFFVIT_EXPORT const char* effvit_emu_kernels() {
  static std::string text;
  const std::lock_guard<std::recursive_mutex> lock(effvit::emu::launch_mutex);
  text.clear();
  for (const auto& item : effvit::emu::counters) text += (text.empty() ? "" : ",") + item.first;
  return text.c_str();
}
