// The CUTLASS kernels of this library, by architecture, operator and dtype of the output, and the choice among them.
// No CUTLASS, no torch. In the emulator's library there are none.
#pragma once
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../prim/types.cuh"
#include "choice.h"

namespace effvit {
namespace cuda {

// launch: else nothing runs, and the error says whether CUTLASS would take the arguments.
using CutlassDense = cudaError_t (*)(const Int8LinearParams&, cudaStream_t, bool launch);
using CutlassSparse = cudaError_t (*)(const Sparse24Int8LinearParams&, const void* meta, cudaStream_t, bool launch);

// Null: not built. Files of kernels fill their places while the library is loaded; zeros come before that.
struct CutlassKernels {
  CutlassDense dense[kCutlassOutputs];
  CutlassSparse sparse[kCutlassOutputs];
  bool ptx;  // for later architectures as well
};
inline CutlassKernels& cutlass_kernels(CutlassArch arch) {
  static CutlassKernels kernels[kCutlassArchs];
  return kernels[static_cast<int>(arch)];
}

// EFFVIT_CUTLASS=0 at the first call, or effvit_cuda_use_cutlass(0): our own kernels only.
inline std::atomic<bool>& cutlass_allowed() {
  static std::atomic<bool> allowed = [] {
    const char* const wish = std::getenv("EFFVIT_CUTLASS");
    return wish == nullptr || std::strcmp(wish, "0") != 0;
  }();
  return allowed;
}

inline bool has_cutlass(const Int8LinearParams& p, const CutlassKernels& kernels) {
  return kernels.dense[static_cast<int>(p.out_dtype)] != nullptr;
}
inline bool has_cutlass(const Sparse24Int8LinearParams& p, const CutlassKernels& kernels) {
  return kernels.sparse[static_cast<int>(p.out_dtype)] != nullptr;
}

// The architecture whose kernel takes a call on a GPU of compute capability `major`, or why none does.
struct CutlassChoice {
  const char* obstacle;  // null: arch runs
  CutlassArch arch;
};
template <class Params>
CutlassChoice choose_cutlass(const Params& p, int major) {
  if (!cutlass_allowed()) return {"EFFVIT_CUTLASS is 0", CutlassArch::kSm80};
  CutlassChoice choice = {"no CUTLASS kernel was built for this GPU and dtype", CutlassArch::kSm80};
  for (const CutlassArch arch : {CutlassArch::kSm90, CutlassArch::kSm80}) {
    const CutlassKernels& kernels = cutlass_kernels(arch);
    const bool runs = arch == CutlassArch::kSm90 ? major == 9 : major == 8 || (major > 8 && kernels.ptx);
    if (!runs || !has_cutlass(p, kernels)) continue;
    choice = {cutlass_obstacle(p, arch), arch};
    if (choice.obstacle == nullptr) break;
  }
  return choice;
}

// Of the current device; 0 where there is none.
inline int device_major() {
#if defined(EFFVIT_EMU)
  return 0;
#else
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
    return 0;
  return major;
#endif
}

}  // namespace cuda
}  // namespace effvit

#if !defined(EFFVIT_CUTLASS_PTX)
#define EFFVIT_CUTLASS_PTX false
#endif
// Enters a kernel: EFFVIT_CUTLASS_KERNEL(kSm90, sparse, function, DType::kFloat16).
#define EFFVIT_CUTLASS_KERNEL(arch_, kind, function, ...)                                    \
  namespace effvit::cuda {                                                                   \
  [[maybe_unused]] static const bool kEntered = [] {                                         \
    CutlassKernels& kernels = cutlass_kernels(CutlassArch::arch_);                           \
    for (const DType type : {__VA_ARGS__}) kernels.kind[static_cast<int>(type)] = &function; \
    kernels.ptx = EFFVIT_CUTLASS_PTX;                                                        \
    return true;                                                                             \
  }();                                                                                       \
  }
