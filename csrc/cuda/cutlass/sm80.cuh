// The int8 products of sm_80 and later, of CUTLASS's parts: cp.async, mma.sync and mma.sp, the epilogue as a visitor.
//
// The visitor brings the sums of a tile together in shared memory, [token][channel], and finish_tile, the epilogue of
// our own kernels, does the rest: any dtype, any strides, and sparse results, whose rows are channels, are transposed
// on the way.
#pragma once
#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/kernel/default_gemm_sparse_with_visitor.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>  // it needs what the others define

#include "../int8_epilogue.cuh"
#include "registry.h"

namespace effvit {
namespace cuda {
namespace cutlass_sm80 {

using namespace int8_impl;

constexpr int kTile = 128, kWarpTile = 64, kElements = 4;
constexpr int kThreads = kTile * kTile / (kWarpTile * kWarpTile) * prim::kWarpSize;
// A multiple of 4: finish_tile reads vectors. Of 8 also, dense: no bank conflicts of a quarter of a warp. Transposed,
// vectors of four tokens are written by the element: with four more than a multiple of 32, and every lane beginning at
// another element, four lanes meet in a bank.
template <bool kChannelsAreRows>
constexpr int kStride = kChannelsAreRows ? kTile + 4 : sum_stride(kTile);

// finish_tile's rows lie sum_stride apart; of the same meaning with another stride.
template <int kRowStride>
struct Sums {
  const int32_t* base;
  template <class V>
  EFFVIT_DEVICE V load_vec(int row, int col) const {
    return *reinterpret_cast<const V*>(base + row * kRowStride + col);
  }
};

template <class Map, bool kChannelsAreRows>
struct Int8EpilogueNode : ::cutlass::epilogue::threadblock::VisitorImpl2x<> {
  struct SharedStorage {
    alignas(16) int32_t sums[kTile * kStride<kChannelsAreRows>];
  };
  struct Arguments {
    Int8Epilogue p;
    EpilogueAccess access;
  };
  using Params = Arguments;

  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }

  CUTLASS_HOST_DEVICE Int8EpilogueNode() {}
  CUTLASS_HOST_DEVICE Int8EpilogueNode(const Params& params, const SharedStorage& storage)
      : params(&params), sums(const_cast<int32_t*>(storage.sums)) {}
  const Params* params = nullptr;
  int32_t* sums = nullptr;

  template <class Places>
  struct Callbacks : ::cutlass::epilogue::threadblock::detail::EmptyCallbacks {
    CUTLASS_DEVICE Callbacks(const Params& params, int32_t* sums, int row, int col, const Places& places)
        : params(params), sums(sums), row(row), col(col), places(places) {}

    const Params& params;
    int32_t* sums;
    int row, col;  // of the tile
    Places places;  // (VECTOR, COLUMN, ROW, ITERATION)

    template <class Sum, int kSize>
    CUTLASS_DEVICE ::cutlass::Array<Sum, kSize> visit(int iteration, int row_index, int col_index, int,
                                                      const ::cutlass::Array<Sum, kSize>& x) {
      static_assert(std::is_same<Sum, int32_t>::value && kSize == kElements, "vectors of exact sums");
      const auto at = places(cute::_0{}, col_index, row_index, iteration);
      const int r = cute::get<0>(at) - row, c = cute::get<1>(at) - col;
      constexpr int stride = kStride<kChannelsAreRows>;
      if constexpr (!kChannelsAreRows) {
        *reinterpret_cast<Vec<int32_t, 4>*>(sums + r * stride + c) = {{x[0], x[1], x[2], x[3]}};
      } else {
        // Element (i + turn) % 4 in step i, by selects: registers have no index.
        const int turn = prim::lane_id() / 2;
        const bool one = turn & 1, two = turn & 2;
        int32_t y[4], z[4];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) y[i] = one ? x[(i + 1) % 4] : x[i];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) z[i] = two ? y[(i + 2) % 4] : y[i];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) sums[(c + (i + turn) % 4) * stride + r] = z[i];
      }
      return x;
    }

    CUTLASS_DEVICE void end_epilogue() {
      __syncthreads();  // the writers of the sums
      const Int8Epilogue& p = params.p;
      const int64_t token = kChannelsAreRows ? col : row, channel = kChannelsAreRows ? row : col;
      const Place at = {token, channel, static_cast<int>(least(kTile, p.M - token)),
                        static_cast<int>(least(kTile, p.N - channel))};
      const Sums<kStride<kChannelsAreRows>> staged{sums};
      switch (p.out_dtype) {
        case DType::kFloat32:
          return finish_tile<float, kThreads, kTile>(p, params.access, staged, at);
        case DType::kBFloat16:
          return finish_tile<prim::bfloat16, kThreads, kTile>(p, params.access, staged, at);
        case DType::kFloat16:
          return finish_tile<prim::float16, kThreads, kTile>(p, params.access, staged, at);
        default:
          return finish_tile<int8_t, kThreads, kTile>(p, params.access, staged, at);
      }
    }
  };

  template <class Problem>
  CUTLASS_DEVICE auto get_callbacks(::cutlass::gemm::GemmCoord tile, int thread, const Problem& problem) {
    auto places = cute::group_modes<3, 6>(Map::partition(cute::make_identity_tensor(problem), thread, tile));
    return Callbacks<decltype(places)>(*params, sums, tile.m() * kTile, tile.n() * kTile, places);
  }
};

template <int kDepth>
using TileShape = ::cutlass::gemm::GemmShape<kTile, kTile, kDepth>;
template <int kDepth>
using WarpShape = ::cutlass::gemm::GemmShape<kWarpTile, kWarpTile, kDepth>;
template <int kDepth>
using Map = ::cutlass::epilogue::threadblock::OutputTileThreadLayout<TileShape<kDepth>, WarpShape<kDepth>, int32_t,
                                                                     kElements, 1>;
template <int kDepth, bool kSparse>
using Tree = ::cutlass::epilogue::threadblock::Sm80EVT<Int8EpilogueNode<Map<kDepth>, kSparse>>;
using Swizzle = ::cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>;

constexpr int kDenseDepth = 64, kSparseDepth = 128, kStages = 3;
using DenseKernel = typename ::cutlass::gemm::kernel::DefaultGemmWithVisitor<
    int8_t, ::cutlass::layout::RowMajor, ::cutlass::ComplexTransform::kNone, 16, int8_t, ::cutlass::layout::ColumnMajor,
    ::cutlass::ComplexTransform::kNone, 16, int32_t, ::cutlass::layout::RowMajor, kElements, int32_t, int32_t,
    ::cutlass::arch::OpClassTensorOp, ::cutlass::arch::Sm80, TileShape<kDenseDepth>, WarpShape<kDenseDepth>,
    ::cutlass::gemm::GemmShape<16, 8, 32>, Tree<kDenseDepth, false>, Swizzle, kStages,
    ::cutlass::arch::OpMultiplyAddSaturate>::GemmKernel;
using SparseKernel = typename ::cutlass::gemm::kernel::DefaultSparseGemmWithVisitor<
    int8_t, ::cutlass::layout::RowMajor, 16, int8_t, ::cutlass::layout::ColumnMajor, 16, int32_t,
    ::cutlass::layout::RowMajor, int32_t, ::cutlass::arch::OpClassTensorOp, ::cutlass::arch::Sm80,
    TileShape<kSparseDepth>, WarpShape<kSparseDepth>, ::cutlass::gemm::GemmShape<16, 8, 64>, Tree<kSparseDepth, true>,
    Swizzle, kStages, ::cutlass::arch::OpMultiplyAddSaturate>::GemmKernel;
static_assert(DenseKernel::kThreadCount == kThreads && SparseKernel::kThreadCount == kThreads,
              "finish_tile counts threads");
constexpr size_t kMostShared = 99 * 1024;  // of a CTA on sm_86 and sm_89
static_assert(sizeof(DenseKernel::SharedStorage) <= kMostShared && sizeof(SparseKernel::SharedStorage) <= kMostShared,
              "one CTA fits everywhere");
// The node is given numbers of fragments; which elements these are, the map and the loads must agree on.
template <class Kernel, class M>
constexpr bool kSameMap = std::is_base_of<typename Kernel::Epilogue::OutputTileIterator::ThreadMap, M>::value;
static_assert(kSameMap<DenseKernel, Map<kDenseDepth>> && kSameMap<SparseKernel, Map<kSparseDepth>>, "one map");

// can_implement is not asked: it wants M and N to be multiples of what this epilogue and operands that are contiguous
// along K do not need. cutlass_obstacle has what they need.
template <class Gemm>
cudaError_t run(const typename Gemm::Arguments& arguments, cudaStream_t stream, bool launch) {
  if (!launch) return cudaSuccess;
  Gemm gemm;
  if (gemm(arguments, nullptr, stream) == ::cutlass::Status::kSuccess) return cudaSuccess;
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? cudaErrorUnknown : error;
}

}  // namespace cutlass_sm80
}  // namespace cuda
}  // namespace effvit
