// C entry to glu's kernels, which are those of row-wise operators, in the emulator, for tests/test_mutants.py. No
// torch.
#define EFFVIT_OP glu
#define EFFVIT_ROWS_HEADER "../rows/glu.h"
#include <cstdio>
#include <stdexcept>

#include "cuda/rows.cuh"

// sizes: outer, inner, columns, the strides of the two dims in a and b, act, dtype. tensors: a, b, out, grad_out, da,
// db; all but a and b are contiguous. `message` (of `size` bytes) receives what went wrong, or stays empty.
extern "C" __attribute__((visibility("default"))) void run_rows(const int64_t* sizes, void** tensors, char* message,
                                                                int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  RowsData p;
  p.dims = 2, p.size[0] = sizes[0], p.size[1] = sizes[1], p.rows = sizes[0] * sizes[1], p.columns = sizes[2];
  p.variant = static_cast<int32_t>(sizes[5]), p.dtype = static_cast<DType>(sizes[6]);
  const auto set = [&](int i, void* data, bool strided) {
    p.data[i] = data;
    p.stride[i][0] = strided ? sizes[3] : sizes[1] * sizes[2], p.stride[i][1] = strided ? sizes[4] : sizes[2];
  };
  try {
    set(0, tensors[0], true), set(1, tensors[1], true), set(2, tensors[2], false);
    if (::effvit::cuda::glu::launch_rows<::effvit::cuda::glu::Forward>(p, nullptr) != cudaSuccess)
      throw std::runtime_error("forward");
    set(0, tensors[3], false), set(1, tensors[0], true), set(2, tensors[1], true);
    set(3, tensors[4], false), set(4, tensors[5], false);
    if (::effvit::cuda::glu::launch_rows<::effvit::cuda::glu::Backward>(p, nullptr) != cudaSuccess)
      throw std::runtime_error("backward");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
