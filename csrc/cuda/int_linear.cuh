// int_linear: device code and launch, on prim only. The tiles of int8_dense.cuh with the epilogue of
// integers, int_epilogue.cuh.
#pragma once
#include "int8_dense.cuh"
#include "int_epilogue.cuh"

namespace effvit {
namespace cuda {
namespace int_linear_impl {

using namespace int8_impl;

struct Plan {
  IntLinearParams p;
  Matrix x, weight;
  int_impl::IntAccess access;
  int64_t column_tiles, units;  // units: tiles of the result; CTA i computes i, i + ctas, ...
};

template <class S, class Out, bool kResidual>
EFFVIT_KERNEL(S::kThreads, S::kMinCtas)
int_linear_fwd_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  compute_tiles<S>(g, [&](const StagedSums<S::kN>& sums, const Place& at) {
    int_impl::finish_tile<Out, S::kThreads, S::kN, kResidual>(g.p, g.access, sums, at);
  });
}

template <class S>
cudaError_t launch_tiles(const IntLinearParams& p, cudaStream_t stream) {
  const int64_t column_tiles = ceil_div(p.N, S::kN);
  const Plan g = {p,
                  make_matrix(p.x, p.M, p.K, p.x_stride_m),
                  make_matrix(p.weight, p.N, p.K, p.weight_stride_n),
                  int_impl::int_access(p),
                  column_tiles,
                  ceil_div(p.M, S::kM) * column_tiles};
  return int_impl::dispatch_integers(p.out_dtype, [&](auto out) {
    using Out = decltype(out);
    return p.residual ? EFFVIT_LAUNCH((int_linear_fwd_kernel<S, Out, true>), grid_size(g.units), S::kThreads,
                                      S::kSharedBytes, stream, g)
                      : EFFVIT_LAUNCH((int_linear_fwd_kernel<S, Out, false>), grid_size(g.units), S::kThreads,
                                      S::kSharedBytes, stream, g);
  });
}

}  // namespace int_linear_impl
}  // namespace cuda

inline cudaError_t launch_int_linear_fwd(const IntLinearParams& p, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::int8_impl;
  if (p.M == 0 || p.N == 0) return cudaSuccess;
  prim::GlobalRanges ranges;
  register_operands(ranges, p.x, p.x_stride_m, p.weight, p.weight_stride_n, p.M, p.N, p.K);
  int_impl::register_epilogue(ranges, p);
  const cudaError_t error =
      dispatch_shape(p.M, p.N, [&](auto shape) { return int_linear_impl::launch_tiles<decltype(shape)>(p, stream); });
  ranges.finish();
  return error;
}

}  // namespace effvit
