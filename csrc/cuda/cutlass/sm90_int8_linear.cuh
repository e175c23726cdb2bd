// int8_linear on sm_90a, by CUTLASS.
#pragma once
#include "sm90.cuh"

#include <cutlass/gemm/device/gemm_universal_adapter.h>

namespace effvit {
namespace cuda {
namespace cutlass_sm90 {

template <class Out>
cudaError_t run_dense(const Int8LinearParams& p, cudaStream_t stream, bool launch) {
  using Kernel = typename Product<Out, false>::Kernel;
  using Gemm = ::cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  const Problem problem{static_cast<int>(p.M), static_cast<int>(p.N), static_cast<int>(p.K), 1};
  typename Gemm::Arguments arguments{::cutlass::gemm::GemmUniversalMode::kGemm,
                                     problem,
                                     {p.x, typename Kernel::StrideA{p.x_stride_m, cute::_1{}, 0}, p.weight,
                                      typename Kernel::StrideB{p.weight_stride_n, cute::_1{}, 0}},
                                     {{{p}},
                                      nullptr,
                                      typename Kernel::StrideC{p.N, cute::_1{}, 0},
                                      static_cast<typename NameOf<Out>::type*>(p.out),
                                      typename Kernel::StrideD{p.N, cute::_1{}, 0}},
                                     hardware()};
  return run<Gemm>(arguments, stream, launch);
}

}  // namespace cutlass_sm90
}  // namespace cuda
}  // namespace effvit
