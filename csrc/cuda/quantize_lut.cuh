// quantize_lut on a GPU: the launch of lut.cuh's kernel.
#pragma once
#include "../common/quantize_lut_params.h"
#include "lut.cuh"

namespace effvit {
namespace cuda {
namespace quantize_lut_impl {

inline cudaError_t launch_quantize_lut_fwd(const QuantizeLutParams& p, cudaStream_t stream) {
  return dispatch_dtype<AllTypes>(p.dtype, [&](auto x) { return lut::launch<decltype(x), uint8_t>(p, stream); });
}

}  // namespace quantize_lut_impl
}  // namespace cuda
}  // namespace effvit
