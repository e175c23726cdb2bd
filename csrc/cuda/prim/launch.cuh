// Launching a kernel: EFFVIT_LAUNCH((kernel<T>), ctas, threads, shared_bytes, stream, args...) gives a cudaError_t.
#pragma once
#include "mma.cuh"

namespace effvit {
namespace prim {

// The tensors the next launches may touch, for the emulator's checks. Empty on a GPU.
class GlobalRanges {
 public:
#if defined(EFFVIT_EMU)
  GlobalRanges() { emu::begin_ranges(); }
  ~GlobalRanges() {
    if (open_) emu::end_ranges(false);
  }
  void read(const void* p, uint64_t bytes) { emu::add_range(p, bytes, false, false); }
  void write(void* p, uint64_t bytes) { emu::add_range(p, bytes, true, false); }
  void write_once(void* p, uint64_t bytes) { emu::add_range(p, bytes, true, true); }  // every byte, exactly once
  void finish() {  // after the last launch: throws if a write_once range has holes
    open_ = false;
    emu::end_ranges(true);
  }

 private:
  bool open_ = true;
#else
  void read(const void*, uint64_t) {}
  void write(void*, uint64_t) {}
  void write_once(void*, uint64_t) {}
  void finish() {}
#endif
  GlobalRanges(const GlobalRanges&) = delete;
  GlobalRanges& operator=(const GlobalRanges&) = delete;
#if !defined(EFFVIT_EMU)

 public:
  GlobalRanges() = default;
#endif
};

#if defined(EFFVIT_EMU)

template <class Kernel, class... Args>
cudaError_t launch(const char* name, Kernel kernel, int64_t ctas, int threads, int64_t shared_bytes, cudaStream_t,
                   const Args&... args) {
  emu::launch(name, ctas, threads, shared_bytes, [&] { kernel(args...); });
  return cudaSuccess;
}

inline int64_t target_ctas() { return emu::target_ctas(); }
inline int64_t max_shared_bytes() { return emu::max_shared_bytes(); }

#else

template <class... Params, class... Args>
cudaError_t launch(const char*, void (*kernel)(Params...), int64_t ctas, int threads, int64_t shared_bytes,
                   cudaStream_t stream, const Args&... args) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

// Enough CTAs for eight on each of 132 multiprocessors. A constant: how partial sums are grouped, and so the last bits
// of a gradient, must not depend on the GPU.
inline int64_t target_ctas() { return 1056; }

// Most dynamic shared memory a CTA may ask for on the current device.
inline int64_t max_shared_bytes() {
  int device = 0, bytes = 48 * 1024;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return 48 * 1024;
  return bytes;
}

#endif

#define EFFVIT_LAUNCH(kernel, ctas, threads, shared_bytes, stream, ...) \
  ::effvit::prim::launch(#kernel, kernel, ctas, threads, shared_bytes, stream, __VA_ARGS__)

}  // namespace prim
}  // namespace effvit
