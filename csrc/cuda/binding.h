// Runs a checked call on a GPU, and in the emulator: workspace, stream, the error of a failed launch.
#pragma once

#include "../common/binding.h"
#include "prim/launch.cuh"

namespace effvit {

inline void check_launch(const Call& call, cudaError_t error) {
  check(error == cudaSuccess, call.op(), "kernel launch failed: ", cudaGetErrorString(error));
}

}  // namespace effvit

// Registers an operator: for the forward and for the backward pass the bytes of workspace (0: none) and the call that
// launches it, of `p`, `workspace` and `stream`. Values of tensors can be read in the emulator only: on a GPU they
// would have to be waited for.
#if defined(EFFVIT_EMU)
#define EFFVIT_CUDA_READABLE true
#else
#define EFFVIT_CUDA_READABLE false
#endif
#define EFFVIT_CUDA_OP(op, forward_bytes, forward_launch, backward_bytes, backward_launch)                      \
  namespace {                                                                                                   \
  struct op##_backend {                                                                                         \
    static constexpr bool kReadable = EFFVIT_CUDA_READABLE;                                                     \
    template <class Op>                                                                                         \
    static void run(effvit::Binding& binding, bool backward) {                                                  \
      using namespace effvit;                                                                                   \
      const auto p = Op::params(binding.call);                                                                  \
      const size_t bytes = backward ? static_cast<size_t>(backward_bytes) : static_cast<size_t>(forward_bytes); \
      [[maybe_unused]] void* const workspace = binding.workspace(static_cast<int64_t>(bytes / sizeof(float)));  \
      const cudaStream_t stream = static_cast<cudaStream_t>(current_stream(binding.device()));                  \
      check_launch(binding.call, backward ? (backward_launch) : (forward_launch));                              \
    }                                                                                                           \
  };                                                                                                            \
  }                                                                                                             \
  EFFVIT_REGISTER(op, op##_backend, true)
