// C entry to the kernels of quantize_lut, dequantize_lut and fake_quantize_lut in the emulator, for
// tests/test_mutants.py. No torch.
#include <cstdio>
#include <stdexcept>

#include "cuda/dequantize_lut.cuh"
#include "cuda/fake_quantize_lut.cuh"
#include "cuda/quantize_lut.cuh"

// op: 0 quantize_lut, 1 dequantize_lut, 2 fake_quantize_lut. sizes: op, rows, columns, elements beyond rows, codes,
// descending. tensors: x, thresholds, values, out; floats and codes.
extern "C" __attribute__((visibility("default"))) void run_lut(const int64_t* sizes, void** tensors, char* message,
                                                               int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  const auto fill = [&](auto p) {
    p.rows = sizes[1], p.columns = sizes[2], p.codes = static_cast<int32_t>(sizes[4]), p.descending = sizes[5] != 0;
    p.dims = 1, p.size[0] = p.rows, p.x_stride[0] = p.columns + sizes[3];
    p.x = tensors[0], p.out = tensors[3];
    p.thresholds = static_cast<const float*>(tensors[1]), p.values = static_cast<const float*>(tensors[2]);
    p.dtype = p.out_dtype = DType::kFloat32;
    return p;
  };
  try {
    cudaError_t error = cudaSuccess;
    if (sizes[0] == 0) error = cuda::quantize_lut_impl::launch_quantize_lut_fwd(fill(QuantizeLutParams()), nullptr);
    if (sizes[0] == 1)
      error = cuda::dequantize_lut_impl::launch_dequantize_lut_fwd(fill(DequantizeLutParams()), nullptr);
    if (sizes[0] == 2)
      error = cuda::fake_quantize_lut_impl::launch_fake_quantize_lut_fwd(fill(FakeQuantizeLutParams()), nullptr);
    if (error != cudaSuccess) throw std::runtime_error("launch");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
