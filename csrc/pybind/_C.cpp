// effvit._C: CPU features and timing loops. Optional: effvit works without it; operators never go through it.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define EFFVIT_X86_LINUX 1
#endif

namespace py = pybind11;

namespace {

#ifdef EFFVIT_X86_LINUX
struct CpuidRegisters {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidRegisters cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidRegisters r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) r = CpuidRegisters();
  return r;
}

// XCR0 says which register states the system saves: an instruction set is usable only where its state is among them.
uint64_t xcr0(bool osxsave) {
  if (!osxsave) return 0;
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}
#endif

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> f;
#ifdef EFFVIT_X86_LINUX
  const CpuidRegisters l1 = cpuid(1, 0), l7 = cpuid(7, 0), l71 = cpuid(7, 1);
  const auto bit = [](uint32_t word, int i) { return ((word >> i) & 1u) != 0; };
  const uint64_t state = xcr0(bit(l1.ecx, 27));
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tile = (state & 0x60000) == 0x60000;
  f["avx2"] = ymm && bit(l7.ebx, 5);
  f["fma"] = ymm && bit(l1.ecx, 12);
  f["f16c"] = ymm && bit(l1.ecx, 29);
  f["avx512f"] = zmm && bit(l7.ebx, 16);
  f["avx512dq"] = zmm && bit(l7.ebx, 17);
  f["avx512bw"] = zmm && bit(l7.ebx, 30);
  f["avx512vl"] = zmm && bit(l7.ebx, 31);
  f["avx512_vnni"] = zmm && bit(l7.ecx, 11);
  f["avx512_bf16"] = zmm && bit(l71.eax, 5);
  f["avx512_fp16"] = zmm && bit(l7.edx, 23);
  f["amx_tile"] = tile && bit(l7.edx, 24);
  f["amx_bf16"] = tile && bit(l7.edx, 22);
  f["amx_int8"] = tile && bit(l7.edx, 25);
#endif
  return f;
}

std::string cpu_brand() {
#ifdef EFFVIT_X86_LINUX
  uint32_t words[12];
  if (cpuid(0x80000000u, 0).eax < 0x80000004u) return "";
  for (uint32_t i = 0; i < 3; ++i) {
    const CpuidRegisters r = cpuid(0x80000002u + i, 0);
    words[4 * i] = r.eax, words[4 * i + 1] = r.ebx, words[4 * i + 2] = r.ecx, words[4 * i + 3] = r.edx;
  }
  char brand[49] = {0};
  std::memcpy(brand, words, 48);
  return brand;
#else
  return "";
#endif
}

// Whether this process may use AMX tile data now. Asking for the permission is the business of the kernels.
bool amx_permission() {
#ifdef EFFVIT_X86_LINUX
  constexpr long kArchGetXcompPerm = 0x1022;
  constexpr uint64_t kXfeatureTileData = uint64_t{1} << 18;
  uint64_t mask = 0;
  return syscall(SYS_arch_prctl, kArchGetXcompPerm, &mask) == 0 && (mask & kXfeatureTileData) != 0;
#else
  return false;
#endif
}

// Seconds of each of `repeats` runs of `inner` calls, divided by `inner`, after `warmup` calls.
std::vector<double> time_calls(const py::function& call, int repeats, int inner, int warmup) {
  if (repeats < 1 || inner < 1 || warmup < 0)
    throw std::invalid_argument("repeats and inner must be >= 1, warmup >= 0");
  for (int i = 0; i < warmup; ++i) call();
  std::vector<double> seconds;
  seconds.reserve(static_cast<size_t>(repeats));
  for (int r = 0; r < repeats; ++r) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < inner; ++i) call();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    seconds.push_back(elapsed.count() / inner);
  }
  return seconds;
}

// Best bytes per second (read + write) of copying `bytes` from one buffer to another, on the calling thread.
double copy_bandwidth(int64_t bytes, int repeats) {
  if (bytes < 1 || repeats < 1) throw std::invalid_argument("bytes and repeats must be >= 1");
  const size_t n = static_cast<size_t>(bytes);
  std::vector<char> from(n, 1), to(n, 0);
  double best = 0;
  for (int r = 0; r < repeats; ++r) {
    const auto start = std::chrono::steady_clock::now();
    std::memcpy(to.data(), from.data(), n);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    volatile char keep = to[n - 1];
    (void)keep;
    best = std::max(best, 2.0 * static_cast<double>(n) / elapsed.count());
  }
  return best;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU features and timing loops of effvit; optional.";
  m.def("cpu_features", &cpu_features, "Instruction sets that the CPU has and the system saves the registers of.");
  m.def("cpu_brand", &cpu_brand, "Name of the CPU.");
  m.def("amx_permission", &amx_permission, "Whether this process has been granted AMX tile data.");
  m.def("time_calls", &time_calls, py::arg("call"), py::arg("repeats") = 20, py::arg("inner") = 1,
        py::arg("warmup") = 3, "Seconds per call of each repeat.");
  m.def("copy_bandwidth", &copy_bandwidth, py::arg("bytes"), py::arg("repeats") = 5,
        "Best read + write bytes per second of memcpy on the calling thread.",
        py::call_guard<py::gil_scoped_release>());
}
