// Our visitor node of sm_90, in the emulator: for tests/test_cutlass.py. No torch.
//
// g++ compiles CUTLASS's templates as C++. Accumulators are filled by CUTLASS's own partition of a tile among the
// threads of a product; the node is called as CollectiveEpilogue::store calls it, and its results are stored where
// CUTLASS's tiled copy takes them. The copies of TMA and the products themselves do not run.
#include <cstdint>
#include <cstdio>
#include <stdexcept>

// The emulator's names of CUDA's types would clash with CUDA's own.
#define cudaError_t emulated_error_t
#define cudaStream_t emulated_stream_t
#define cudaSuccess emulated_success
#define cudaGetErrorString emulated_error_string
#include "cuda/int8_epilogue.cuh"
#include "cuda/cutlass/registry.h"
#undef cudaError_t
#undef cudaStream_t
#undef cudaSuccess
#undef cudaGetErrorString

#include <cuda_runtime.h>
#define CUTLASS_SM90_COLLECTIVE_BUILDER_SUPPORTED  // else it follows from the version of nvcc
static uint3 threadIdx, blockIdx, blockDim, gridDim;
inline void __syncthreads() { effvit::prim::sync_threads(); }
int __syncthreads_and(int);
void __threadfence();
void __syncwarp();
namespace cutlass::arch {
int LaneId();
int SmId();
}  // namespace cutlass::arch
#include "cuda/cutlass/sm90.cuh"

namespace effvit {
namespace {

using namespace effvit::cuda;
using namespace cute;

constexpr int kSide = 128;

// sums: [rows, cols] of the problem, padded to whole tiles, `stride` apart. out: [rows, cols], out_row and out_col
// apart.
template <class Out, bool kSparse>
EFFVIT_KERNEL(256, 1)
node_kernel(const Int8Epilogue* p, const int32_t* sums, int stride, int tiles_n, int rows, int cols, int out_row,
            int out_col) {
  using Product = cutlass_sm90::Product<Out, kSparse>;
  using Epilogue = typename Product::Epilogue;
  using Tile = cutlass_sm90::TileShape;
  using EpilogueTile = typename Epilogue::EpilogueTile;
  using Node = cutlass_sm90::Int8EpilogueNode<Out, kSparse>;
  constexpr int kFragment = Epilogue::DispatchPolicy::FragmentSize;
  const int thread = prim::thread_id();
  const int tile_m = static_cast<int>(prim::cta_id()) / tiles_n, tile_n = static_cast<int>(prim::cta_id()) % tiles_n;
  typename Product::Kernel::TiledMma mma;

  // What store() makes of its arguments, in its words.
  auto cD_mn = local_tile(make_identity_tensor(make_shape(rows, cols)), take<0, 2>(Tile{}), make_coord(tile_m, tile_n));
  TiledCopy copy_atom = make_tiled_copy_C_atom(typename Epilogue::CopyAtomC{}, mma);
  TiledCopy r2s = make_tiled_copy_S(Copy_Atom<typename Epilogue::CopyOpR2S, typename Node::Element>{}, copy_atom);
  ThrCopy thread_r2s = r2s.get_slice(thread);
  Tensor tRS_cD_mn = thread_r2s.partition_S(flat_divide(cD_mn, EpilogueTile{}));
  Tensor cD = make_coord_tensor(cD_mn.layout());
  Tensor tRS_cD = make_coord_tensor(tRS_cD_mn.layout());
  auto residue_cD = make_coord(rows, cols) - cD_mn(_0{});
  auto residue_tRS_cD = make_coord(rows, cols) - tRS_cD_mn(_0{});
  auto tRS_rC = make_tensor<float>(take<0, 3>(tRS_cD.shape()));

  // Accumulators, and the place of each: by the product, not by the copy.
  auto places = mma.get_slice(thread).partition_C(make_identity_tensor(take<0, 2>(Tile{})));
  auto accumulators = make_tensor<int32_t>(places.shape());
  auto numbers = make_tensor<int32_t>(places.shape());
  for (int i = 0; i < size(places); ++i) {
    const int r = tile_m * kSide + get<0>(places(i)), c = tile_n * kSide + get<1>(places(i));
    accumulators(i) = sums[int64_t{r} * stride + c];
    numbers(i) = get<0>(places(i)) * kSide + get<1>(places(i));
  }
  Tensor tRS_rAcc = thread_r2s.retile_S(accumulators), tRS_rPlace = thread_r2s.retile_S(numbers);
  Tensor fragments = recast<::cutlass::Array<int32_t, kFragment>>(tRS_rAcc);
  Tensor at = recast<::cutlass::Array<int32_t, kFragment>>(tRS_rPlace);

  const typename Node::Params params{*p};
  const typename Node::SharedStorage storage;
  Node node(params, storage);
  ::cutlass::epilogue::fusion::detail::ConsumerStoreArgs args(
      make_shape(rows, cols, kSide, 1), Tile{}, make_coord(tile_m, tile_n, 0, 0), mma, EpilogueTile{}, r2s, cD,
      residue_cD, tRS_cD, residue_tRS_cD, tRS_rC, thread);
  auto callbacks = node.template get_consumer_store_callbacks<true>(args);
  constexpr int kTileM = size<0>(Tile{}) / decltype(size<1>(tRS_rAcc))::value;
  constexpr int kTileN = size<1>(Tile{}) / decltype(size<2>(tRS_rAcc))::value;
  constexpr int kEpiM = decltype(size<0>(EpilogueTile{}))::value, kEpiN = decltype(size<1>(EpilogueTile{}))::value;
  const auto visit = [&](int mma_m, int mma_n, int fragment, int v, int m, int n) {
    const auto y = callbacks.visit(fragments(_, mma_m, mma_n)(fragment), v, m, n);
    const auto to = at(_, mma_m, mma_n)(fragment);
    for (int i = 0; i < kFragment; ++i) {
      const int r = tile_m * kSide + to[i] / kSide, c = tile_n * kSide + to[i] % kSide;
      const typename Node::Element element = y[i];
      if (r < rows && c < cols)
        prim::store_global(static_cast<Out*>(p->out) + int64_t{r} * out_row + int64_t{c} * out_col,
                           prim::bit_cast<Out>(element));
    }
  };
  for (int n = 0; n < size<4>(tRS_cD); ++n) {
    for (int m = 0; m < size<3>(tRS_cD); ++m) {
      const int count = size(tRS_rC) / kFragment;
      if constexpr (kEpiM * kEpiN > kTileM * kTileN) {
        constexpr int kM = kEpiM / kTileM, kN = kEpiN / kTileN;
        for (int j = 0; j < kN; ++j)
          for (int i = 0; i < kM; ++i) visit(m * kM + i, n * kN + j, 0, j * kM + i, m, n);
      } else {
        for (int v = 0; v < count; ++v) visit(m, n * kEpiN / kTileN, n % (kTileN / kEpiN) * count + v, v, m, n);
      }
    }
  }
}

template <class Out, bool kSparse>
void run(const Int8Epilogue& p, const int32_t* sums) {
  const int rows = static_cast<int>(kSparse ? p.N : p.M), cols = static_cast<int>(kSparse ? p.M : p.N);
  const int tiles_m = (rows + kSide - 1) / kSide, tiles_n = (cols + kSide - 1) / kSide, n = static_cast<int>(p.N);
  prim::GlobalRanges ranges;
  int8_impl::register_epilogue(ranges, p);
  EFFVIT_LAUNCH((node_kernel<Out, kSparse>), tiles_m * tiles_n, 256, 0, nullptr, &p, sums, tiles_n * kSide, tiles_n,
                rows, cols, kSparse ? 1 : n, kSparse ? n : 1);
  ranges.finish();
}

}  // namespace
}  // namespace effvit

// As run_cutlass_sm80.
extern "C" __attribute__((visibility("default"))) void run_cutlass_sm90(const int64_t* sizes, void** tensors,
                                                                        float out_scale, char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  Int8Epilogue p;
  p.M = sizes[0], p.N = sizes[1], p.residual_stride_m = sizes[3], p.x_scale_stride = sizes[4] == 1 ? 0 : 1;
  p.out_dtype = static_cast<DType>(sizes[5]), p.bias_dtype = static_cast<DType>(sizes[6]);
  p.residual_dtype = static_cast<DType>(sizes[7]), p.activation = static_cast<Activation>(sizes[8]);
  p.out_scale = out_scale;
  const int32_t* const sums = static_cast<const int32_t*>(tensors[0]);
  p.x_scale = static_cast<const float*>(tensors[1]), p.w_scale = static_cast<const float*>(tensors[2]);
  p.bias = tensors[3], p.residual = tensors[4], p.out = tensors[5];
  try {
    int8_impl::dispatch_output(p.out_dtype, [&](auto out) {
      if constexpr (!std::is_same<decltype(out), int32_t>::value) {
        if (sizes[2] != 0) {
          run<decltype(out), true>(p, sums);
        } else {
          run<decltype(out), false>(p, sums);
        }
      }
      return 0;
    });
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
