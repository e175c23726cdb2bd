// C entry to the sparse24_int8_linear kernels in the emulator, for tests/test_mutants.py. No torch.
#include <cstdio>
#include <stdexcept>

#include "cuda/sparse24_int8_linear.cuh"

// sizes: M, N, K, stride of x, of values, of the residual, number of row scales, out_dtype, bias_dtype, residual_dtype,
// activation. tensors: x, values, meta, x_scale, w_scale, bias, residual, out; bias and residual may be null. `message`
// (of `size` bytes) receives what went wrong, or stays empty.
extern "C" __attribute__((visibility("default"))) void run_sparse24_int8_linear(const int64_t* sizes, void** tensors,
                                                                                float out_scale, char* message,
                                                                                int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  Sparse24Int8LinearParams p;
  p.M = sizes[0], p.N = sizes[1], p.K = sizes[2];
  p.x_stride_m = sizes[3], p.values_stride_n = sizes[4], p.residual_stride_m = sizes[5];
  p.x_scale_stride = sizes[6] == 1 ? 0 : 1;
  p.out_dtype = static_cast<DType>(sizes[7]), p.bias_dtype = static_cast<DType>(sizes[8]);
  p.residual_dtype = static_cast<DType>(sizes[9]), p.activation = static_cast<Activation>(sizes[10]);
  p.out_scale = out_scale;
  p.x = static_cast<const int8_t*>(tensors[0]), p.values = static_cast<const int8_t*>(tensors[1]);
  p.meta = static_cast<const uint8_t*>(tensors[2]);
  p.x_scale = static_cast<const float*>(tensors[3]), p.w_scale = static_cast<const float*>(tensors[4]);
  p.bias = tensors[5], p.residual = tensors[6], p.out = tensors[7];
  try {
    if (launch_sparse24_int8_linear_fwd(p, nullptr) != cudaSuccess) throw std::runtime_error("launch");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
