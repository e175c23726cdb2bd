// int8_linear on sm_80 and later, by CUTLASS.
#pragma once
#include "sm80.cuh"

#include <cutlass/gemm/device/gemm_universal_adapter.h>

namespace effvit {
namespace cuda {
namespace cutlass_sm80 {

using Dense = ::cutlass::gemm::device::GemmUniversalAdapter<DenseKernel>;

inline cudaError_t run_dense(const Int8LinearParams& p, cudaStream_t stream, bool launch) {
  const ::cutlass::gemm::GemmCoord problem(static_cast<int>(p.M), static_cast<int>(p.N), static_cast<int>(p.K));
  const typename Dense::Arguments arguments(::cutlass::gemm::GemmUniversalMode::kGemm, problem, 1,
                                            {{p, epilogue_access(p)}}, p.x, p.weight, nullptr, nullptr, 0, 0, 0, 0,
                                            p.x_stride_m, p.weight_stride_n, 0, 0);
  return run<Dense>(arguments, stream, launch);
}

}  // namespace cutlass_sm80
}  // namespace cuda
}  // namespace effvit
