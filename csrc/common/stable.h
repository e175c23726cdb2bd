// The only file that includes torch: the LibTorch stable ABI, owned tensors, memory, the thread pool, streams.
//
// A library is compiled with EFFVIT_NAMESPACE (effvit, or effvit_emu for the emulator) and EFFVIT_DISPATCH_KEY (CPU or
// CUDA). Only symbols of torch >= 2.11's stable ABI may be used: one binary serves every torch and Python from there
// on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "view.h"

namespace effvit {

using torch::headeronly::ScalarType;

// ---- tensors --------------------------------------------------------------------------------------------------------

// A tensor that is owned. torch::stable::Tensor counts references, which takes an allocation each.
class Handle {
 public:
  Handle() = default;
  explicit Handle(AtenTensorHandle handle) : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(other.release()) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Handle() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  explicit operator bool() const { return handle_ != nullptr; }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  // One more reference to the same tensor, for functions of torch::stable.
  torch::stable::Tensor tensor() const {
    AtenTensorHandle copy = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &copy));
    return torch::stable::Tensor(copy);
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

struct Device {
  int32_t type = 0, index = 0;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

inline Device device_of(const Handle& t) {
  Device d;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &d.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &d.index));
  return d;
}

// torch's numbers of the element types that operators take, by DType.
inline int32_t torch_dtype(DType type) {
  static const int32_t numbers[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(),
                                    aoti_torch_dtype_int32(),   aoti_torch_dtype_int8(),     aoti_torch_dtype_uint8(),
                                    aoti_torch_dtype_int16()};
  return numbers[static_cast<int>(type)];
}

inline DType dtype_of(const Handle& t) {
  int32_t number = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  for (int i = 0; i < static_cast<int>(DType::kOther); ++i) {
    const DType type = static_cast<DType>(i);
    if (number == torch_dtype(type)) return type;
  }
  return DType::kOther;
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Bool:
      return "torch.bool";
    default:
      return torch::headeronly::toString(t);
  }
}

inline const char* dtype_name(DType t) {
  static const char* const names[] = {"torch.float32", "torch.bfloat16", "torch.float16", "torch.int32",
                                      "torch.int8",    "torch.uint8",    "torch.int16"};
  return names[static_cast<int>(t)];
}

// malloc maps every block from here on afresh (glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64 bits).
inline constexpr int64_t kFreshBytes = 32 << 20;

// A contiguous tensor for a kernel to fill, seen through `view`: its sizes and dtype say which. A large one on the CPU
// is fresh memory, a page fault for every 4 KiB written: that can cost more than the kernel. Huge pages are asked for
// where the system leaves them to the program.
inline Handle allocate(View& view, const Device& device) {
  int64_t bytes = element_bytes(view.dtype);
  for (int i = view.dim - 1, next = 1; i >= 0; --i) {
    view.stride[i] = i + 1 < view.dim ? view.stride[i + 1] * (view.size[i + 1] > 1 ? view.size[i + 1] : 1) : next;
    bytes *= view.size[i];
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(view.dim, view.size, view.stride, torch_dtype(view.dtype),
                                                  device.type, device.index, &handle));
  Handle t(handle);
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(t.get(), &view.data));
#if defined(__linux__) && !defined(USE_CUDA)
  constexpr uintptr_t kHugePage = 2 << 20;
  if (bytes >= kFreshBytes) {
    const uintptr_t data = reinterpret_cast<uintptr_t>(view.data);
    const uintptr_t begin = (data + kHugePage - 1) / kHugePage * kHugePage,
                    end = (data + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return t;
}

// ---- devices ------------------------------------------------------------------------------------------------------

#if defined(USE_CUDA)
// The stream torch is using on a device. Kernels are launched on it and never synchronise.
inline void* current_stream(const Device& device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream));
  return stream;
}

// Makes a device the current one while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Device& device) {
    if (device.index < 0) return;  // not a CUDA tensor: the checks that follow say so
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device.index, &guard_));
  }
  ~DeviceGuard() {
    if (guard_) aoti_torch_delete_cuda_guard(guard_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUDAGuardHandle guard_ = nullptr;
};
#else
inline void* current_stream(const Device&) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(const Device&) {}
};
#endif

// Runs f(begin, end) over [0, n) on torch's thread pool, in pieces of at least `grain`. f must not throw: an exception
// that crosses the pool loses its message, so everything is validated before.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n > grain)
    torch::stable::parallel_for(0, n, grain, f);
  else if (n > 0)
    f(0, n);
}

// ---- what a library says of itself ----------------------------------------------------------------------------------

namespace abi {

// A line per op; defined once per library by EFFVIT_DEFINE_ABI. torch does not notice when a schema says `int` and a
// kernel reads a double: tests/test_abi.py compares.
std::string& signatures();
std::string& declarations();

}  // namespace abi
}  // namespace effvit

#define EFFVIT_DEFINE_ABI_LINES(name) \
  namespace effvit::abi {             \
  std::string& name() {               \
    static std::string lines;         \
    return lines;                     \
  }                                   \
  }
#define EFFVIT_ABI_EXPORT extern "C" __attribute__((visibility("default"))) const char*

// Defines the C symbols `effvit_abi_signatures` and `effvit_declarations` of this library. Once per library.
#define EFFVIT_DEFINE_ABI()                                                               \
  EFFVIT_DEFINE_ABI_LINES(signatures)                                                     \
  EFFVIT_DEFINE_ABI_LINES(declarations)                                                   \
  EFFVIT_ABI_EXPORT effvit_abi_signatures() { return effvit::abi::signatures().c_str(); } \
  EFFVIT_ABI_EXPORT effvit_declarations() { return effvit::abi::declarations().c_str(); }
