// sparse24_int8_linear on sm_80 and later, by CUTLASS.
#pragma once
#include "sm80.cuh"

#include <cutlass/gemm/device/gemm_sparse_with_visitor.h>

namespace effvit {
namespace cuda {
namespace cutlass_sm80 {

using Sparse = ::cutlass::gemm::device::SparseGemmWithVisitor<
    int8_t, ::cutlass::layout::RowMajor, int8_t, ::cutlass::layout::ColumnMajor, int32_t, ::cutlass::layout::RowMajor,
    int32_t, ::cutlass::arch::OpClassTensorOp, ::cutlass::arch::Sm80, TileShape<kSparseDepth>, WarpShape<kSparseDepth>,
    ::cutlass::gemm::GemmShape<16, 8, 64>, Tree<kSparseDepth, true>, Swizzle, kStages, 16, 16,
    ::cutlass::arch::OpMultiplyAddSaturate>;
static_assert(std::is_same<Sparse::GemmKernel, SparseKernel>::value, "the one that is checked in sm80.cuh");
static_assert(Sparse::kElementsPerElementE == 16 && sizeof(Sparse::ElementE) == 4, "an int32 has the metadata of 32");

// meta: as format sm80 of effvit.sparse24_formats.
inline cudaError_t run_sparse(const Sparse24Int8LinearParams& p, const void* meta, cudaStream_t stream, bool launch) {
  using LayoutE = Sparse::LayoutE;
  const int m = static_cast<int>(p.N), n = static_cast<int>(p.M), k = static_cast<int>(p.K);
  auto* const e = static_cast<Sparse::ElementE*>(const_cast<void*>(meta));
  const Sparse::Arguments arguments({m, n, k}, {p.values, p.values_stride_n}, {p.x, p.x_stride_m},
                                    {e, LayoutE::packed({m, k / 32})}, {{p, epilogue_access(p)}});
  return run<Sparse>(arguments, stream, launch);
}

}  // namespace cutlass_sm80
}  // namespace cuda
}  // namespace effvit
