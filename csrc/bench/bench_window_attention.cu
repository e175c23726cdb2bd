// Times the bare window_attention CUDA kernels, without torch and Python: CUDA events, cold L2. Every output is
// poisoned and must be written in full; whether the numbers are right is for the tests to say.
//
//   nvcc -O3 -std=c++17 --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a -I csrc
//   csrc/bench/bench_window_attention.cu
//   ./a.out [--batch B] [--calls N] [--filter TEXT]      (--calls 1 --batch 1: for compute-sanitizer and ncu)
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/window_attention.cuh"

namespace {

using namespace effvit;
using namespace effvit::cuda;
using namespace effvit::cuda::window_attention_impl;

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define REQUIRE(call) require((call), #call)

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

struct Options {
  int64_t batch = 64;
  int calls = 50;
  std::string filter;
};

template <class T>
int run(int64_t size, int64_t heads, int32_t shift, const Options& options, Buffer<char>& l2) {
  const bool wide = std::is_same<T, float>::value;
  const int64_t B = options.batch, rows = B * size * size * heads, width = heads * 32;
  Buffer<T> qkv(rows * 96), out(rows * 32), grad_out(rows * 32), dqkv(rows * 96);
  Buffer<float> table(heads * 169), lse(rows), dtable(heads * 169);
  qkv.fill(1), table.fill(2), grad_out.fill(3);

  WindowAttentionParams p;
  p.B = B, p.H = p.W = size, p.h = heads, p.d = p.dv = 32;
  p.q = qkv.data, p.k = qkv.data + width, p.v = qkv.data + 2 * width;
  p.q_stride_h = p.k_stride_h = p.v_stride_h = p.grad_out_stride_h = 32;
  p.q_stride_x = p.k_stride_x = p.v_stride_x = 3 * width;
  p.q_stride_y = p.k_stride_y = p.v_stride_y = 3 * width * size;
  p.q_stride_b = p.k_stride_b = p.v_stride_b = 3 * width * size * size;
  p.grad_out_stride_x = width, p.grad_out_stride_y = width * size, p.grad_out_stride_b = width * size * size;
  p.bias_table = table.data;
  p.bias_stride_h = 169, p.bias_stride_y = 13, p.bias_stride_x = 1;
  p.out = out.data, p.lse = lse.data;
  p.grad_out = grad_out.data, p.dqkv = dqkv.data, p.dbias_table = dtable.data;
  p.window_h = p.window_w = 7;
  p.shift_h = p.shift_w = shift;
  p.scale = 1.f / std::sqrt(32.f);
  p.dtype = wide ? DType::kFloat32 : DType::kBFloat16;
  Buffer<char> workspace(static_cast<int64_t>(window_attention_bwd_workspace_bytes(p)));

  cudaStream_t stream;
  cudaEvent_t start, stop;
  REQUIRE(cudaStreamCreate(&stream));
  REQUIRE(cudaEventCreate(&start));
  REQUIRE(cudaEventCreate(&stop));
  int wrong = 0;
  for (const bool backward : {false, true}) {
    const auto launch = [&] {
      return backward ? launch_window_attention_bwd(p, workspace.data, stream) : launch_window_attention_fwd(p, stream);
    };
    char name[64];
    std::snprintf(name, sizeof name, "%ldx%ld h%ld shift %d %s %s", long(size), long(size), long(heads), shift,
                  wide ? "float32" : "bfloat16", backward ? "backward" : "forward");
    if (std::string(name).find(options.filter) == std::string::npos) {
      if (!backward) REQUIRE(launch());  // the backward pass reads its out and lse
      continue;
    }
    if (backward)
      dqkv.poison(), dtable.poison();
    else
      out.poison(), lse.poison();
    REQUIRE(cudaDeviceSynchronize());
    REQUIRE(launch());
    REQUIRE(cudaStreamSynchronize(stream));
    const unsigned long long unwritten =
        backward ? dqkv.unwritten() + dtable.unwritten() : out.unwritten() + lse.unwritten();
    wrong += unwritten != 0;
    std::vector<float> times;
    for (int call = 0; call < options.calls; ++call) {
      REQUIRE(cudaMemsetAsync(l2.data, call, l2.count, stream));
      REQUIRE(cudaEventRecord(start, stream));
      REQUIRE(launch());
      REQUIRE(cudaEventRecord(stop, stream));
      REQUIRE(cudaEventSynchronize(stop));
      float ms = 0;
      REQUIRE(cudaEventElapsedTime(&ms, start, stop));
      times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    const double ms = times[times.size() / 2], p20 = times[times.size() / 5], p80 = times[times.size() * 4 / 5];
    const double flops = double(rows) * 2 * 49 * 32 * (backward ? 5 : 2);
    const double bytes = double(rows) * 32 * sizeof(T) * (backward ? 8 : 4) + 4.0 * rows;
    std::printf("%-36s %9.4f [%.4f, %.4f] %9.1f %9.2f %s\n", name, ms, p20, p80, bytes / ms / 1e6, flops / ms / 1e9,
                unwritten ? "  UNWRITTEN OR NaN" : "");
  }
  REQUIRE(cudaEventDestroy(start));
  REQUIRE(cudaEventDestroy(stop));
  REQUIRE(cudaStreamDestroy(stream));
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--batch") == 0)
      options.batch = std::max(1, std::atoi(argv[i + 1]));
    else if (std::strcmp(argv[i], "--calls") == 0)
      options.calls = std::max(1, std::atoi(argv[i + 1]));
    else if (std::strcmp(argv[i], "--filter") == 0)
      options.filter = argv[i + 1];
    else
      return std::fprintf(stderr, "unknown option %s\n", argv[i]), 2;
  }
  cudaDeviceProp properties;
  REQUIRE(cudaGetDeviceProperties(&properties, 0));
  Buffer<char> l2(std::max<int64_t>(2 * properties.l2CacheSize, 1 << 20));
  std::printf("%s, batch %ld, %d calls, cold L2\n", properties.name, long(options.batch), options.calls);
  std::printf("%-36s %9s %18s %9s %9s\n", "case", "ms", "[p20, p80]", "GB/s", "TFLOP/s");
  const struct {
    int64_t size, heads;
  } stages[] = {{56, 3}, {28, 6}, {14, 12}, {7, 24}};
  int wrong = 0;
  for (const auto& stage : stages) {
    for (const int32_t shift : {0, 3}) {
      wrong += run<float>(stage.size, stage.heads, shift, options, l2);
      wrong += run<__nv_bfloat16>(stage.size, stage.heads, shift, options, l2);
    }
  }
  return wrong != 0;
}
