// fake_quantize_lut on a GPU: the launch of lut.cuh's kernel.
#pragma once
#include "../common/fake_quantize_lut_params.h"
#include "lut.cuh"

namespace effvit {
namespace cuda {
namespace fake_quantize_lut_impl {

inline cudaError_t launch_fake_quantize_lut_fwd(const FakeQuantizeLutParams& p, cudaStream_t stream) {
  return dispatch_dtype<AllTypes>(p.dtype, [&](auto x) { return lut::launch<decltype(x), decltype(x)>(p, stream); });
}

}  // namespace fake_quantize_lut_impl
}  // namespace cuda
}  // namespace effvit
