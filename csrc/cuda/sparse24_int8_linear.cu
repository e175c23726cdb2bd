// sparse24_int8_linear on a GPU, and in the emulator. The kernels are in sparse24_int8_linear.cuh.
#include "sparse24_int8_linear.cuh"

#include "../common/sparse24_int8_linear.h"
#include "binding.h"

namespace effvit {
namespace {

const Sparse24Int8LinearParams& canonical(const Call& call, const Sparse24Int8LinearParams& p) {
  check(call.given("meta"), call.op(), "meta must be given on a GPU, got None with packed values");
  return p;
}

}  // namespace
}  // namespace effvit

EFFVIT_CUDA_OP(sparse24_int8_linear, 0, launch_sparse24_int8_linear_fwd(canonical(binding.call, p), stream), 0,
               cudaSuccess)
