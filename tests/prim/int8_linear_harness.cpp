// C entry to the int8_linear kernels in the emulator, for tests/test_mutants.py. No torch.
#include <cstdio>
#include <stdexcept>

#include "cuda/int8_linear.cuh"

// sizes: M, N, K, strides of x, weight and residual, dtype of the residual, of the output, activation. tensors: x,
// weight, x_scale, w_scale, bias (float32 or null), residual (or null), out. `message` (of `size` bytes) receives what
// went wrong, or stays empty.
extern "C" __attribute__((visibility("default"))) void run_int8_linear(const int64_t* sizes, void** tensors,
                                                                       double out_scale, char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  Int8LinearParams p;
  p.M = sizes[0], p.N = sizes[1], p.K = sizes[2];
  p.x_stride_m = sizes[3], p.weight_stride_n = sizes[4], p.residual_stride_m = sizes[5];
  p.residual_dtype = static_cast<DType>(sizes[6]), p.out_dtype = static_cast<DType>(sizes[7]);
  p.activation = static_cast<Activation>(sizes[8]);
  p.x = static_cast<const int8_t*>(tensors[0]), p.weight = static_cast<const int8_t*>(tensors[1]);
  p.x_scale = static_cast<const float*>(tensors[2]), p.x_scale_stride = 1;
  p.w_scale = static_cast<const float*>(tensors[3]);
  p.bias = tensors[4], p.residual = tensors[5], p.out = tensors[6];
  p.out_scale = static_cast<float>(out_scale);
  try {
    if (launch_int8_linear_fwd(p, nullptr) != cudaSuccess) throw std::runtime_error("launch");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
