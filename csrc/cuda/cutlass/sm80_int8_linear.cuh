// int8_linear on sm_80 and later, by CUTLASS.
#pragma once
#include "sm80.cuh"

namespace effvit {
namespace cuda {
namespace cutlass_sm80 {

constexpr int kDenseDepth = 64;
using DenseKernel = ::cutlass::gemm::kernel::DefaultGemmWithVisitor<
    int8_t, ::cutlass::layout::RowMajor, ::cutlass::ComplexTransform::kNone, 16, int8_t, ::cutlass::layout::ColumnMajor,
    ::cutlass::ComplexTransform::kNone, 16, int32_t, ::cutlass::layout::RowMajor, kElements, int32_t, int32_t,
    ::cutlass::arch::OpClassTensorOp, ::cutlass::arch::Sm80, TileShape<kDenseDepth>, WarpShape<kDenseDepth>,
    ::cutlass::gemm::GemmShape<16, 8, 32>, Tree<kDenseDepth, false>, Swizzle, 3,
    ::cutlass::arch::OpMultiplyAddSaturate>::GemmKernel;
using Dense = ::cutlass::gemm::device::GemmUniversalAdapter<DenseKernel>;
static_assert(DenseKernel::kThreadCount == kThreads, "finish_tile counts threads");

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
