// The int8 products of sm_90a, of CUTLASS's parts: TMA loads, wgmma by specialised warps, the epilogue as a visitor
// node.
//
// The rows of a dense problem are tokens, those of a sparse one channels: wgmma.sp takes the sparse operand first. Its
// result is column-major then, which is the same memory. TMA stores the results.
#pragma once
#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "../int8_epilogue.cuh"
#include "registry.h"

namespace effvit {
namespace cuda {
namespace cutlass_sm90 {

using int8_impl::activate;
using int8_impl::rounded;

// CUTLASS's name of an element type of ours.
template <class T>
struct NameOf {
  using type = T;
};
template <>
struct NameOf<prim::bfloat16> {
  using type = ::cutlass::bfloat16_t;
};
template <>
struct NameOf<prim::float16> {
  using type = ::cutlass::half_t;
};

// A leaf of the visitor tree: takes the sums of a fragment, gives its results, rounded once. It reads scales, bias and
// residual itself, of any dtype and stride, at the places that CUTLASS's coordinates name. Beyond the problem it reads
// nothing; what it gives there is not stored.
template <class Out, bool kChannelsAreRows>
struct Int8EpilogueNode : ::cutlass::epilogue::fusion::Sm90VisitorImpl<> {
  using Element = typename NameOf<Out>::type;
  static_assert(sizeof(Element) == sizeof(Out), "the same bits");

  struct SharedStorage {};
  struct Arguments {
    Int8Epilogue p;
  };
  using Params = Arguments;

  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static ::cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                                ::cutlass::CudaHostAdapter* = nullptr) {
    return ::cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE Int8EpilogueNode() {}
  CUTLASS_HOST_DEVICE Int8EpilogueNode(const Params& params, const SharedStorage&) : params(&params) {}
  const Params* params = nullptr;

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      const ::cutlass::epilogue::fusion::detail::ProducerLoadArgs<Args...>&) {
    return ::cutlass::epilogue::fusion::detail::EmptyProducerLoadCallbacks{};
  }

  template <class Coordinates, class Residue>
  struct Callbacks : ::cutlass::epilogue::fusion::detail::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(const Int8Epilogue& p, int64_t row, int64_t col, const Coordinates& places,
                             const Residue& left)
        : p(p), row(row), col(col), places(places), left(left) {}

    const Int8Epilogue& p;
    int64_t row, col;  // of this thread's first element
    Coordinates places;  // (COPY, COPY_M, COPY_N, EPI_M, EPI_N), relative to it
    Residue left;  // how far it is to the end of the problem

    template <class Sum, int kSize>
    CUTLASS_DEVICE ::cutlass::Array<Element, kSize> visit(const ::cutlass::Array<Sum, kSize>& sums, int v, int m,
                                                          int n) {
      static_assert(std::is_same<Sum, int32_t>::value, "sums are exact");
      const auto place = places(cute::_, cute::_, cute::_, m, n);
      float y[kSize];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const auto at = place(v * kSize + i);
        y[i] = 0.f;
        if (!cute::elem_less(at, left)) continue;
        const int64_t r = row + cute::get<0>(at), c = col + cute::get<1>(at);
        const int64_t token = kChannelsAreRows ? c : r, channel = kChannelsAreRows ? r : c;
        const float scale =
            prim::load_global(p.x_scale + token * p.x_scale_stride) * prim::load_global(p.w_scale + channel);
        const float bias = p.bias ? load_small(p.bias, channel, p.bias_dtype) : 0.f;
        const float residual =
            p.residual ? load_small(p.residual, token * p.residual_stride_m + channel, p.residual_dtype) : 0.f;
        y[i] = math::fma(static_cast<float>(sums[i]), scale, bias) + residual;
      }
      const float inverse = 1.f / p.out_scale;
      ::cutlass::Array<Element, kSize> out;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const float a = activate(p.activation, y[i]);
        const Out x = rounded<Out>(std::is_same<Out, int8_t>::value ? a * inverse : a);
        out[i] = prim::bit_cast<Element>(x);
      }
      return out;
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const ::cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...>& args) {
    const int64_t rows = cute::get<0>(args.problem_shape_mnkl), cols = cute::get<1>(args.problem_shape_mnkl);
    return Callbacks<decltype(args.tCcD), decltype(args.residue_tCcD)>(
        params->p, rows - cute::get<0>(args.residue_tCcD), cols - cute::get<1>(args.residue_tCcD), args.tCcD,
        args.residue_tCcD);
  }
};

using TileShape = cute::Shape<cute::_128, cute::_128, cute::_128>;
using ClusterShape = cute::Shape<cute::_1, cute::_1, cute::_1>;
using Schedule = ::cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using Problem = cute::Shape<int, int, int, int>;
constexpr int kAlignment = 16;  // int8 of 16 bytes, what TMA copies at least

template <class Out, bool kSparse>
struct Product {
  using OperatorClass =
      cute::conditional_t<kSparse, ::cutlass::arch::OpClassSparseTensorOp, ::cutlass::arch::OpClassTensorOp>;
  using Element = typename NameOf<Out>::type;
  using OutLayout = cute::conditional_t<kSparse, ::cutlass::layout::ColumnMajor, ::cutlass::layout::RowMajor>;
  static constexpr int kOutAlignment = 16 / static_cast<int>(sizeof(Element));
  using Tree = ::cutlass::epilogue::fusion::Sm90EVT<Int8EpilogueNode<Out, kSparse>>;

  using Epilogue = typename ::cutlass::epilogue::collective::CollectiveBuilder<
      ::cutlass::arch::Sm90, ::cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      ::cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, OutLayout, kOutAlignment, Element,
      OutLayout, kOutAlignment, ::cutlass::epilogue::TmaWarpSpecializedCooperative, Tree>::CollectiveOp;
  using Mainloop = typename ::cutlass::gemm::collective::CollectiveBuilder<
      ::cutlass::arch::Sm90, OperatorClass, int8_t, ::cutlass::layout::RowMajor, kAlignment*(kSparse ? 2 : 1), int8_t,
      ::cutlass::layout::ColumnMajor, kAlignment, int32_t, TileShape, ClusterShape,
      ::cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = ::cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;
};

template <class Gemm>
cudaError_t run(const typename Gemm::Arguments& arguments, cudaStream_t stream, bool launch) {
  if (Gemm::get_workspace_size(arguments) != 0) return cudaErrorInvalidValue;
  if (Gemm::can_implement(arguments) != ::cutlass::Status::kSuccess) return cudaErrorInvalidValue;
  if (!launch) return cudaSuccess;
  Gemm gemm;
  if (gemm.run(arguments, nullptr, stream) == ::cutlass::Status::kSuccess) return cudaSuccess;
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? cudaErrorUnknown : error;
}

inline ::cutlass::KernelHardwareInfo hardware() {
  ::cutlass::KernelHardwareInfo info;
  if (cudaGetDevice(&info.device_id) != cudaSuccess ||
      cudaDeviceGetAttribute(&info.sm_count, cudaDevAttrMultiProcessorCount, info.device_id) != cudaSuccess)
    info.sm_count = 0;  // CUTLASS asks then
  return info;
}

}  // namespace cutlass_sm90
}  // namespace cuda
}  // namespace effvit
