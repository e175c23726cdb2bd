// int8_linear: device code and launch, on prim only. The tiles of int8_dense.cuh with the epilogue of
// int8_epilogue.cuh.
#pragma once
#include "int8_dense.cuh"

namespace effvit {
namespace cuda {
namespace int8_linear_impl {

using namespace int8_impl;

struct Plan {
  Int8LinearParams p;
  Matrix x, weight;
  EpilogueAccess access;
  int64_t column_tiles, units;  // units: tiles of the result; CTA i computes i, i + ctas, ...
};

template <class S, class Out>
EFFVIT_KERNEL(S::kThreads, S::kMinCtas)
int8_linear_fwd_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  compute_tiles<S>(g, [&](const StagedSums<S::kN>& sums, const Place& at) {
    finish_tile<Out, S::kThreads, S::kN>(g.p, g.access, sums, at);
  });
}

// ---- plan and launch ----

template <class S>
cudaError_t launch_tiles(const Int8LinearParams& p, cudaStream_t stream) {
  const Plan g = {p,
                  make_matrix(p.x, p.M, p.K, p.x_stride_m),
                  make_matrix(p.weight, p.N, p.K, p.weight_stride_n),
                  epilogue_access(p),
                  ceil_div(p.N, S::kN),
                  ceil_div(p.M, S::kM) * ceil_div(p.N, S::kN)};
  return dispatch_output(p.out_dtype, [&](auto out) {
    return EFFVIT_LAUNCH((int8_linear_fwd_kernel<S, decltype(out)>), grid_size(g.units), S::kThreads, S::kSharedBytes,
                         stream, g);
  });
}

}  // namespace int8_linear_impl
}  // namespace cuda

inline cudaError_t launch_int8_linear_fwd(const Int8LinearParams& p, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::int8_linear_impl;
  if (p.M == 0 || p.N == 0) return cudaSuccess;
  prim::GlobalRanges ranges;
  register_operands(ranges, p.x, p.x_stride_m, p.weight, p.weight_stride_n, p.M, p.N, p.K);
  register_epilogue(ranges, p);
  const cudaError_t error =
      dispatch_shape(p.M, p.N, [&](auto shape) { return launch_tiles<decltype(shape)>(p, stream); });
  ranges.finish();
  return error;
}

}  // namespace effvit
