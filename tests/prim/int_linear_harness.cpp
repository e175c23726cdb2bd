// C entry to the int_linear kernels in the emulator, for tests/test_mutants.py. No torch.
#include <cstdio>
#include <stdexcept>

#include "cuda/int_linear.cuh"

// sizes: M, N, K, strides of x, weight and residual, dtype of the residual, of the output, ends of the result. tensors:
// x, weight, multiplier, shift, bias, residual, its multiplier and shift (null where absent), out. `message` (of `size`
// bytes) receives what went wrong, or stays empty.
extern "C" __attribute__((visibility("default"))) void run_int_linear(const int64_t* sizes, void** tensors,
                                                                      char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  IntLinearParams p;
  p.M = sizes[0], p.N = sizes[1], p.K = sizes[2];
  p.x_stride_m = sizes[3], p.weight_stride_n = sizes[4], p.residual_stride_m = sizes[5];
  p.residual_dtype = static_cast<DType>(sizes[6]), p.out_dtype = static_cast<DType>(sizes[7]);
  p.low = static_cast<int32_t>(sizes[8]), p.high = static_cast<int32_t>(sizes[9]);
  p.x = static_cast<const int8_t*>(tensors[0]), p.weight = static_cast<const int8_t*>(tensors[1]);
  const auto vector = [&](int i) { return static_cast<const int32_t*>(tensors[i]); };
  p.multiplier = vector(2), p.shift = vector(3), p.bias = vector(4), p.residual = tensors[5];
  p.residual_multiplier = vector(6), p.residual_shift = vector(7), p.out = tensors[8];
  p.largest_sum = 128 * 128 * p.K;
  try {
    if (launch_int_linear_fwd(p, nullptr) != cudaSuccess) throw std::runtime_error("launch");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
