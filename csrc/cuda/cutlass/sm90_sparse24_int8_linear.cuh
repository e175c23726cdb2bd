// sparse24_int8_linear on sm_90a, by CUTLASS.
#pragma once
#include "sm90.cuh"

#include <cutlass/gemm/device/gemm_universal_adapter.h>

namespace effvit {
namespace cuda {
namespace cutlass_sm90 {

// meta: as format sm90 of effvit.sparse24_formats.
template <class Out>
cudaError_t run_sparse(const Sparse24Int8LinearParams& p, const void* meta, cudaStream_t stream, bool launch) {
  using Kernel = typename Product<Out, true>::Kernel;
  using Gemm = ::cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Mainloop = typename Kernel::CollectiveMainloop;
  const Problem problem{static_cast<int>(p.N), static_cast<int>(p.M), static_cast<int>(p.K), 1};
  typename Gemm::Arguments arguments{
      ::cutlass::gemm::GemmUniversalMode::kGemm,
      problem,
      {p.values, Mainloop::SparseConfig::fill_layoutA(problem), p.x,
       typename Kernel::StrideB{p.x_stride_m, cute::_1{}, 0}, static_cast<const typename Mainloop::ElementE*>(meta),
       Mainloop::SparseConfig::fill_layoutE(problem)},
      {{{p}},
       nullptr,
       typename Kernel::StrideC{cute::_1{}, p.N, 0},
       static_cast<typename NameOf<Out>::type*>(p.out),
       typename Kernel::StrideD{cute::_1{}, p.N, 0}},
      hardware()};
  return run<Gemm>(arguments, stream, launch);
}

}  // namespace cutlass_sm90
}  // namespace cuda
}  // namespace effvit
