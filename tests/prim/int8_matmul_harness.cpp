// C entry to the int8_matmul kernels in the emulator, for tests/test_mutants.py. No torch.
#include <cstdio>
#include <stdexcept>

#include "cuda/int8_matmul.cuh"

// sizes: batches, M, N, K, elements beyond rows, b transposed, dtypes of a, b, result; multiplier, shift, ends.
// tensors: a, b, out.
extern "C" __attribute__((visibility("default"))) void run_int8_matmul(const int64_t* sizes, void** tensors,
                                                                       char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  Int8MatmulParams p;
  p.batches = sizes[0], p.M = sizes[1], p.N = sizes[2], p.K = sizes[3];
  const int64_t gap = sizes[4];
  p.transpose_b = sizes[5] != 0;
  p.a_dtype = static_cast<DType>(sizes[6]), p.b_dtype = static_cast<DType>(sizes[7]);
  p.out_dtype = static_cast<DType>(sizes[8]);
  p.rescale = {static_cast<int32_t>(sizes[9]), static_cast<int32_t>(sizes[10]), static_cast<int32_t>(sizes[11]),
               static_cast<int32_t>(sizes[12])};
  p.dims = 1, p.size[0] = p.batches;
  p.a_row = p.K + gap, p.b_row = (p.transpose_b ? p.K : p.N) + gap;
  p.a_stride[0] = p.M * p.a_row, p.b_stride[0] = (p.transpose_b ? p.N : p.K) * p.b_row;
  p.a = tensors[0], p.b = tensors[1], p.out = tensors[2];
  try {
    if (launch_int8_matmul_fwd(p, nullptr) != cudaSuccess) throw std::runtime_error("launch");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
