// int_linear on a GPU, and in the emulator: int_linear.cuh.
#include "int_linear.cuh"

#include "../common/int_linear.h"
#include "binding.h"

namespace effvit {
namespace {

const IntLinearParams& plain(const Call& call, const IntLinearParams& p) {
  check(!p.packed, call.op(), "weight must be plain [N, K] on a GPU, got packed");
  return p;
}

}  // namespace
}  // namespace effvit

EFFVIT_CUDA_OP(int_linear, 0, launch_int_linear_fwd(plain(binding.call, p), stream), 0, cudaSuccess)
