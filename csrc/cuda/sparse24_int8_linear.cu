// sparse24_int8_linear on a GPU, and in the emulator. Our kernels are in sparse24_int8_linear.cuh,
// CUTLASS's in cutlass/.
#include "sparse24_int8_linear.cuh"

#include "../common/sparse24_int8_linear.h"
#include "binding.h"
#include "cutlass/registry.h"
#include "cutlass/sparse24_meta.cuh"

namespace effvit {
namespace {

const Sparse24Int8LinearParams& canonical(const Call& call, const Sparse24Int8LinearParams& p) {
  check(call.given("meta"), call.op(), "meta must be given on a GPU, got None with packed values");
  return p;
}

cuda::CutlassChoice choose(const Sparse24Int8LinearParams& p) { return cuda::choose_cutlass(p, cuda::device_major()); }

// Of metadata in the order of CUTLASS's kernel, made anew in every call: an eighth of the dense weight.
int64_t workspace_bytes(const Sparse24Int8LinearParams& p) {
  const cuda::CutlassChoice choice = choose(p);
  return choice.obstacle ? 0 : cuda::cutlass_meta_bytes(p.N, p.K, choice.arch);
}

cudaError_t launch(const Sparse24Int8LinearParams& p, void* workspace, cudaStream_t stream) {
  const cuda::CutlassChoice choice = choose(p);
  if (choice.obstacle) return launch_sparse24_int8_linear_fwd(p, stream);
  const cudaError_t error = launch_sparse24_meta(p.meta, p.N, p.K, choice.arch, workspace, stream);
  if (error != cudaSuccess) return error;
  return cuda::cutlass_kernels(choice.arch).sparse[static_cast<int>(p.out_dtype)](p, workspace, stream, true);
}

}  // namespace
}  // namespace effvit

EFFVIT_CUDA_OP(sparse24_int8_linear, workspace_bytes(p), launch(canonical(binding.call, p), workspace, stream), 0,
               cudaSuccess)

// launch_sparse24_meta by itself, for tests. arch: 80 or 90.
extern "C" __attribute__((visibility("default"))) int effvit_cuda_sparse24_meta(const uint8_t* meta, int64_t N,
                                                                                int64_t K, int64_t arch, void* out,
                                                                                void* stream) {
  using namespace effvit;
  const auto chosen = arch == 90 ? effvit::cuda::CutlassArch::kSm90 : effvit::cuda::CutlassArch::kSm80;
  return static_cast<int>(launch_sparse24_meta(meta, N, K, chosen, out, static_cast<cudaStream_t>(stream)));
}
