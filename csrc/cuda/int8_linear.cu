// int8_linear on a GPU, and in the emulator. Our kernels are in int8_linear.cuh, CUTLASS's in cutlass/.
#include "int8_linear.cuh"

#include "../common/int8_linear.h"
#include "binding.h"
#include "cutlass/registry.h"

namespace effvit {
namespace {

const Int8LinearParams& plain(const Call& call, const Int8LinearParams& p) {
  check(!p.packed, call.op(), "weight must be plain [N, K] on a GPU, got packed");
  return p;
}

cudaError_t launch(const Int8LinearParams& p, cudaStream_t stream) {
  const cuda::CutlassChoice choice = cuda::choose_cutlass(p, cuda::device_major());
  if (choice.obstacle) return launch_int8_linear_fwd(p, stream);
  return cuda::cutlass_kernels(choice.arch).dense[static_cast<int>(p.out_dtype)](p, stream, true);
}

}  // namespace
}  // namespace effvit

EFFVIT_CUDA_OP(int8_linear, 0, launch(plain(binding.call, p), stream), 0, cudaSuccess)
