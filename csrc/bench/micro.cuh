// What the CUDA microbenchmarks share: poisoned buffers, random contents, options, timing with CUDA events on a cold
// L2.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace effvit {
namespace bench {

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define REQUIRE(call) ::effvit::bench::require((call), #call)

// Approximately normal values from a counter: the sum of four uniform numbers, unit variance.
template <class T>
__global__ void fill_kernel(T* x, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t s = static_cast<uint32_t>(i) * 2654435761u + seed;
    float sum = 0.f;
    for (int k = 0; k < 4; ++k) {
      s ^= s << 13, s ^= s >> 17, s ^= s << 5;
      sum += static_cast<float>(s >> 8) * (1.f / (1 << 24)) - 0.5f;
    }
    x[i] = static_cast<T>(1.7320508f * sum);
  }
}

template <class T>
__global__ void count_nan_kernel(const T* x, int64_t count, unsigned long long* found) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    const float value = static_cast<float>(x[i]);
    if (value != value) atomicAdd(found, 1ull);
  }
}

template <class T>
struct Buffer {
  explicit Buffer(int64_t count) : count(count) { REQUIRE(cudaMalloc(&data, std::max<int64_t>(count, 1) * sizeof(T))); }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void fill(uint32_t seed) {
    fill_kernel<<<1024, 256>>>(data, count, seed);
    REQUIRE(cudaGetLastError());
  }
  void poison() { REQUIRE(cudaMemset(data, 0xff, count * sizeof(T))); }  // NaN
  unsigned long long unwritten() const {
    unsigned long long* found;
    unsigned long long result = 0;
    REQUIRE(cudaMalloc(&found, sizeof result));
    REQUIRE(cudaMemset(found, 0, sizeof result));
    count_nan_kernel<<<1024, 256>>>(data, count, found);
    REQUIRE(cudaGetLastError());
    REQUIRE(cudaMemcpy(&result, found, sizeof result, cudaMemcpyDeviceToHost));
    REQUIRE(cudaFree(found));
    return result;
  }
  int64_t count;
  T* data = nullptr;
};

// --calls N, --filter TEXT; --smoke: one call of small problems, for compute-sanitizer; --profile: one call of one
// large problem, for ncu.
struct Options {
  int calls = 50;
  bool smoke = false, profile = false;
  std::string filter;
};

inline Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--smoke") {
      options.smoke = true, options.calls = 1;
    } else if (name == "--profile") {
      options.profile = true, options.calls = 1;
    } else if (name == "--calls" && i + 1 < argc) {
      options.calls = std::max(1, std::atoi(argv[++i]));
    } else if (name == "--filter" && i + 1 < argc) {
      options.filter = argv[++i];
    } else {
      std::fprintf(stderr, "unknown option %s\n", argv[i]);
      std::exit(2);
    }
  }
  return options;
}

// Runs and times the cases of one operator; remembers whether any left part of its output unwritten.
class Runner {
 public:
  explicit Runner(const Options& options) : options_(options) {
    cudaDeviceProp properties;
    REQUIRE(cudaGetDeviceProperties(&properties, 0));
    l2_bytes_ = std::max<size_t>(2 * size_t(properties.l2CacheSize), 1 << 20);
    REQUIRE(cudaMalloc(&l2_, l2_bytes_));
    REQUIRE(cudaStreamCreate(&stream_));
    REQUIRE(cudaEventCreate(&start_));
    REQUIRE(cudaEventCreate(&stop_));
    std::printf("%s, %d calls, cold L2\n", properties.name, options.calls);
    std::printf("%-44s %9s %18s %9s %9s\n", "case", "ms", "[p20, p80]", "GB/s", "TFLOP/s");
  }
  ~Runner() {
    cudaEventDestroy(start_);
    cudaEventDestroy(stop_);
    cudaStreamDestroy(stream_);
    cudaFree(l2_);
  }
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

  cudaStream_t stream() const { return stream_; }
  bool wrong() const { return wrong_; }
  bool wanted(const std::string& name) const { return name.find(options_.filter) != std::string::npos; }

  // `poison` fills the outputs with NaN, `unwritten` counts the NaN left in them after one launch.
  void time(const std::string& name, double bytes, double flops, const std::function<void()>& poison,
            const std::function<cudaError_t()>& launch, const std::function<unsigned long long()>& unwritten) {
    poison();
    REQUIRE(cudaDeviceSynchronize());
    REQUIRE(launch());
    REQUIRE(cudaStreamSynchronize(stream_));
    const bool holes = unwritten() != 0;
    wrong_ = wrong_ || holes;
    std::vector<float> times;
    for (int call = 0; call < options_.calls; ++call) {
      REQUIRE(cudaMemsetAsync(l2_, call, l2_bytes_, stream_));
      REQUIRE(cudaEventRecord(start_, stream_));
      REQUIRE(launch());
      REQUIRE(cudaEventRecord(stop_, stream_));
      REQUIRE(cudaEventSynchronize(stop_));
      float ms = 0;
      REQUIRE(cudaEventElapsedTime(&ms, start_, stop_));
      times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    const double ms = times[times.size() / 2], p20 = times[times.size() / 5], p80 = times[times.size() * 4 / 5];
    std::printf("%-44s %9.4f [%.4f, %.4f] %9.1f %9.2f %s\n", name.c_str(), ms, p20, p80, bytes / ms / 1e6,
                flops / ms / 1e9, holes ? "  UNWRITTEN OR NaN" : "");
  }

 private:
  Options options_;
  size_t l2_bytes_ = 0;
  void* l2_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
  bool wrong_ = false;
};

}  // namespace bench
}  // namespace effvit
