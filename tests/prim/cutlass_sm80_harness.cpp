// CUTLASS's epilogue of sm_80 with our visitor node, in the emulator: for tests/test_cutlass.py. No torch.
//
// g++ compiles CUTLASS's templates as C++: what is inline PTX, the main loop, is not called. Accumulators are filled by
// CUTLASS's own iterator of a warp's fragment, so everything after the products runs as on a GPU, one fiber a thread.
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
static uint3 threadIdx, blockIdx, blockDim, gridDim;
inline void __syncthreads() { effvit::prim::sync_threads(); }
int __syncthreads_and(int);
void __threadfence();
void __syncwarp();
namespace cutlass::arch {
int LaneId();
int SmId();
}  // namespace cutlass::arch
#include "cuda/cutlass/sm80.cuh"

namespace effvit {
namespace {

using namespace effvit::cuda;

// sums: [rows, cols] of the problem, padded to whole tiles, `stride` apart.
template <class Kernel>
EFFVIT_KERNEL(128, 1)
epilogue_kernel(const typename Kernel::Epilogue::Params* params, const int32_t* sums, int stride, int tiles_n, int rows,
                int cols) {
  using Epilogue = typename Kernel::Epilogue;
  using Warp = typename Kernel::Mma::Operator;
  using Count = typename Kernel::Mma::WarpCount;
  static typename Epilogue::SharedStorage storage;  // CTAs run one after the other
  const int thread = prim::thread_id(), warp = thread / 32, lane = thread % 32;
  const int m = static_cast<int>(prim::cta_id()) / tiles_n, n = static_cast<int>(prim::cta_id()) % tiles_n;
  const int32_t* const tile = sums + int64_t{m} * 128 * stride + n * 128;
  typename Warp::IteratorC from({const_cast<int32_t*>(tile), stride}, lane);
  from.add_tile_offset({warp % Count::kM, warp / Count::kM});
  typename Warp::FragmentC accumulators;
  from.load(accumulators);
  Epilogue epilogue(*params, storage, thread, warp, lane);
  epilogue(accumulators, {m, n, 0}, cute::make_shape(rows, cols, 1), thread);
  prim::sync_threads();  // readers of the storage, before the next CTA
}

template <class Kernel>
void run(const Int8Epilogue& p, const int32_t* sums, int rows, int cols) {
  const int tiles_m = (rows + 127) / 128, tiles_n = (cols + 127) / 128;
  prim::GlobalRanges ranges;
  int8_impl::register_epilogue(ranges, p);
  const typename Kernel::Epilogue::FusionCallbacks::Arguments arguments{{p, int8_impl::epilogue_access(p)}};
  const auto params = Kernel::Epilogue::FusionCallbacks::to_underlying_arguments(
      cutlass::gemm::GemmCoord(rows, cols, 128), arguments, nullptr);
  EFFVIT_LAUNCH((epilogue_kernel<Kernel>), tiles_m * tiles_n, 128, 0, nullptr, &params, sums, tiles_n * 128, tiles_n,
                rows, cols);
  ranges.finish();
}

}  // namespace
}  // namespace effvit

// sizes: M, N, sparse, stride of the residual, number of row scales, out_dtype, bias_dtype, residual_dtype, activation.
// tensors: sums, x_scale, w_scale, bias, residual, out; bias and residual may be null. Sums: [M, N] dense, [N, M]
// sparse, padded to multiples of 128. `message` (of `size` bytes) receives what went wrong, or stays empty.
extern "C" __attribute__((visibility("default"))) void run_cutlass_sm80(const int64_t* sizes, void** tensors,
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
  const int m = static_cast<int>(p.M), n = static_cast<int>(p.N);
  try {
    if (sizes[2] != 0) {
      run<effvit::cuda::cutlass_sm80::SparseKernel>(p, sums, n, m);
    } else {
      run<effvit::cuda::cutlass_sm80::DenseKernel>(p, sums, m, n);
    }
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
