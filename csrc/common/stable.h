// The only file that includes torch: the LibTorch stable ABI, argument checks, the thread pool, streams, EFFVIT_IMPL.
//
// A library is compiled with EFFVIT_NAMESPACE (effvit, or effvit_emu for the emulator) and EFFVIT_DISPATCH_KEY (CPU or
// CUDA). Only symbols of torch >= 2.11's stable ABI may be used: one binary serves every torch and Python from there
// on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dtype.h"

namespace effvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- errors: `effvit::<op>: <argument> must be <expected>, got <given>` ------------------------------------------

inline void print(std::ostream& os, const std::vector<int64_t>& v) {
  os << '[';
  for (size_t i = 0; i < v.size(); ++i) os << (i ? ", " : "") << v[i];
  os << ']';
}
template <class T>
void print(std::ostream& os, const T& x) {
  os << x;
}

template <class... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream os;
  os << "effvit::" << op << ": ";
  (print(os, args), ...);
  throw std::runtime_error(os.str());
}

template <class... Args>
void check(bool ok, const char* op, const Args&... args) {
  if (!ok) fail(op, args...);
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  const auto s = t.sizes();
  return std::vector<int64_t>(s.begin(), s.end());
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

// Of a tensor that check_float_dtype has let through.
inline DType to_dtype(ScalarType t) {
  return t == ScalarType::Float ? DType::kFloat32 : t == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat16;
}

inline bool is_float_dtype(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

inline void check_float_dtype(const char* op, const char* name, const Tensor& t) {
  check(is_float_dtype(t.scalar_type()), op, name, " must be float32, bfloat16 or float16, got ",
        dtype_name(t.scalar_type()));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected, const char* like) {
  check(t.scalar_type() == expected, op, name, " must be ", dtype_name(expected), " like ", like, ", got ",
        dtype_name(t.scalar_type()));
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  int32_t ta = 0, tb = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.get(), &ta));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(b.get(), &tb));
  return ta == tb && a.get_device_index() == b.get_device_index();
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like,
                         const char* like_name = "q") {
  check(same_device(t, like), op, name, " must be on the device of ", like_name, ", got another device");
}

inline void check_shape(const char* op, const char* name, const Tensor& t, const char* dims,
                        const std::vector<int64_t>& expected) {
  const auto got = shape_of(t);
  check(got == expected, op, name, " must be ", dims, " = ", expected, ", got ", got);
}

// A number of the schema as the float32 that kernels compute with.
inline float check_finite(const char* op, const char* name, double x) {
  check(std::isfinite(x), op, name, " must be finite, got ", x);
  const float narrow = static_cast<float>(x);
  check(std::isfinite(narrow), op, name, " must be finite in float32, got ", x);
  return narrow;
}

inline float check_positive(const char* op, const char* name, double x) {
  const float narrow = check_finite(op, name, x);
  check(narrow > 0.f, op, name, " must be positive, got ", x);
  return narrow;
}

inline void check_last_stride(const char* op, const char* name, const Tensor& t) {
  const int64_t n = t.dim();
  check(t.numel() == 0 || t.size(n - 1) <= 1 || t.stride(n - 1) == 1, op, name, " must have a last stride of 1, got ",
        t.stride(n - 1));
}

// ---- tensors ------------------------------------------------------------------------------------------------------

inline const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline OptionalTensor contiguous_or_null(const OptionalTensor& t) {
  if (!t) return std::nullopt;
  return t->is_contiguous() ? *t : torch::stable::contiguous(*t);
}

// malloc maps every block from here on afresh (glibc's DEFAULT_MMAP_THRESHOLD_MAX on 64 bits).
constexpr uintptr_t kFreshBytes = 32 << 20;

// A tensor for a kernel to fill. A large one on the CPU is fresh memory, a page fault for every 4 KiB written: that can
// cost more than the kernel. Huge pages are asked for where the system leaves them to the program.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, size, dtype);
#if defined(__linux__) && !defined(USE_CUDA)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(t.numel()) * t.element_size();
  if (bytes >= kFreshBytes) {
    const uintptr_t data = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t begin = (data + kHugePage - 1) / kHugePage * kHugePage,
                    end = (data + bytes) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return t;
}

// ---- devices ------------------------------------------------------------------------------------------------------

#if defined(USE_CUDA)
// The stream torch is using on the tensor's device. Kernels are launched on it and never synchronise.
inline void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

// Makes the tensor's device the current one while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& t) {
    if (t.get_device_index() < 0) return;  // not a CUDA tensor: the checks that follow say so
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(t.get_device_index(), &guard_));
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
inline void* current_stream(const Tensor&) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};
#endif

// Runs f(begin, end) over [0, n) on torch's thread pool, in pieces of at least `grain`. f must not throw: an exception
// that crosses the pool loses its message, so everything is validated before.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, f);
}

// ---- registration -------------------------------------------------------------------------------------------------

namespace abi {

// The C++ signature that TORCH_BOX deduces, spelt like a schema, for tests/test_abi.py: torch does not notice when a
// schema says `int` and the C++ function takes a double, and hands over garbage.
template <class T>
struct Spelling;
#define EFFVIT_SPELL(T, text)                 \
  template <>                                 \
  struct Spelling<T> {                        \
    static std::string get() { return text; } \
  };
EFFVIT_SPELL(Tensor, "Tensor")
EFFVIT_SPELL(OptionalTensor, "Tensor?")
EFFVIT_SPELL(int64_t, "int")
EFFVIT_SPELL(double, "float")
EFFVIT_SPELL(bool, "bool")
EFFVIT_SPELL(std::optional<int64_t>, "int?")
EFFVIT_SPELL(std::optional<double>, "float?")
EFFVIT_SPELL(std::vector<int64_t>, "int[]")
#undef EFFVIT_SPELL
template <class... T>
struct Spelling<std::tuple<T...>> {
  static std::string get() {
    std::string s;
    ((s += (s.empty() ? "" : ", ") + Spelling<T>::get()), ...);
    return "(" + s + ")";
  }
};

template <class R, class... A>
std::string signature(const char* op, R (*)(A...)) {
  return std::string(op) + Spelling<std::tuple<std::remove_cv_t<std::remove_reference_t<A>>...>>::get() + " -> " +
         Spelling<R>::get();
}

std::string& registry();  // one line per op; defined once per library by EFFVIT_DEFINE_ABI

struct Entry {
  explicit Entry(const std::string& s) { registry() += s + "\n"; }
};

}  // namespace abi
}  // namespace effvit

// Defines the C symbol `effvit_abi_signatures` of this library. Once per library.
#define EFFVIT_DEFINE_ABI()                                                               \
  namespace effvit::abi {                                                                 \
  std::string& registry() {                                                               \
    static std::string lines;                                                             \
    return lines;                                                                         \
  }                                                                                       \
  }                                                                                       \
  extern "C" __attribute__((visibility("default"))) const char* effvit_abi_signatures() { \
    return effvit::abi::registry().c_str();                                               \
  }

// Registers fn as the kernel of effvit::op on this library's device.
#define EFFVIT_IMPL(op, fn)                                                                \
  static const effvit::abi::Entry effvit_abi_entry_##op(effvit::abi::signature(#op, &fn)); \
  STABLE_TORCH_LIBRARY_IMPL(EFFVIT_NAMESPACE, EFFVIT_DISPATCH_KEY, m) { m.impl(#op, TORCH_BOX(&fn)); }
