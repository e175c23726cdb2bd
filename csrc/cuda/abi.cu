// What this library says of itself: its C++ signatures (see tests/test_abi.py), and which CUTLASS kernels it has.
#include "../common/stable.h"
#include "cutlass/registry.h"

EFFVIT_DEFINE_ABI()

namespace effvit {
namespace {

template <class Params>
const char* choose(const Params& p, int64_t major, int64_t* arch) {
  using namespace cuda;
  if (major < 0) return cutlass_obstacle(p, static_cast<CutlassArch>(*arch));
  const CutlassChoice choice = choose_cutlass(p, static_cast<int>(major));
  *arch = static_cast<int64_t>(choice.arch);
  return choice.obstacle;
}

template <class Params>
Params described(const int64_t* call) {
  Params p;
  p.M = call[1], p.N = call[2], p.K = call[3];
  p.x = reinterpret_cast<const int8_t*>(call[4]), p.x_stride_m = call[5];
  p.out = reinterpret_cast<void*>(call[9]), p.out_dtype = static_cast<DType>(call[10]);
  return p;
}

Int8LinearParams dense(const int64_t* call) {
  auto p = described<Int8LinearParams>(call);
  p.weight = reinterpret_cast<const int8_t*>(call[6]), p.weight_stride_n = call[7], p.packed = call[8] != 0;
  return p;
}

Sparse24Int8LinearParams sparse(const int64_t* call) {
  auto p = described<Sparse24Int8LinearParams>(call);
  p.values = reinterpret_cast<const int8_t*>(call[6]), p.values_stride_n = call[7];
  p.meta = reinterpret_cast<const uint8_t*>(call[8]);
  return p;
}

}  // namespace
}  // namespace effvit

// Which of CUTLASS's kernels takes a call: null and its architecture, 80 or 90; or why none does. call: 0 dense or 1
// sparse, M, N, K; address and row stride of x, of weight or values; address of meta or, dense, whether packed; address
// and dtype of the output. major: of the compute capability; -1: the rule for the kernels of *arch, built or not.
EFFVIT_ABI_EXPORT effvit_cuda_cutlass_obstacle(const int64_t* call, int64_t major, int64_t* arch) {
  using namespace effvit;
  *arch = *arch == 90 ? 1 : 0;
  const char* const obstacle = call[0] == 0 ? choose(dense(call), major, arch) : choose(sparse(call), major, arch);
  *arch = *arch == 1 ? 90 : 80;
  return obstacle;
}

// Whether the kernel chosen for the call takes its arguments, by CUTLASS's own checks: 0, or an error. Nothing runs.
extern "C" __attribute__((visibility("default"))) int effvit_cuda_cutlass_check(const int64_t* call, int64_t arch) {
  using namespace effvit;
  const effvit::cuda::CutlassKernels& kernels =
      effvit::cuda::cutlass_kernels(arch == 90 ? effvit::cuda::CutlassArch::kSm90 : effvit::cuda::CutlassArch::kSm80);
  const int64_t out = call[10];
  if (call[0] == 0) return kernels.dense[out] ? static_cast<int>(kernels.dense[out](dense(call), nullptr, false)) : -1;
  const Sparse24Int8LinearParams p = sparse(call);
  return kernels.sparse[out] ? static_cast<int>(kernels.sparse[out](p, p.meta, nullptr, false)) : -1;
}

// From the next call on: 1, CUTLASS's kernels where they apply; 0, our own.
extern "C" __attribute__((visibility("default"))) void effvit_cuda_use_cutlass(int use) {
  effvit::cuda::cutlass_allowed() = use != 0;
}
