// dequantize_lut on a GPU: the launch of lut.cuh's kernel.
#pragma once
#include "../common/dequantize_lut_params.h"
#include "lut.cuh"

namespace effvit {
namespace cuda {
namespace dequantize_lut_impl {

inline cudaError_t launch_dequantize_lut_fwd(const DequantizeLutParams& p, cudaStream_t stream) {
  return dispatch_dtype<AllTypes>(p.out_dtype, [&](auto y) { return lut::launch<uint8_t, decltype(y)>(p, stream); });
}

}  // namespace dequantize_lut_impl
}  // namespace cuda
}  // namespace effvit
