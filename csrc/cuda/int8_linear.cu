// int8_linear on a GPU, and in the emulator. The kernels are in int8_linear.cuh.
#include "int8_linear.cuh"

#include "../common/int8_linear.h"
#include "binding.h"

namespace effvit {
namespace {

const Int8LinearParams& plain(const Call& call, const Int8LinearParams& p) {
  check(!p.packed, call.op(), "weight must be plain [N, K] on a GPU, got packed");
  return p;
}

}  // namespace
}  // namespace effvit

EFFVIT_CUDA_OP(int8_linear, 0, launch_int8_linear_fwd(plain(binding.call, p), stream), 0, cudaSuccess)
