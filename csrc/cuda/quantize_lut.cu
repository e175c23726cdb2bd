// quantize_lut on a GPU, and in the emulator. The kernel is in lut.cuh.
#include "quantize_lut.cuh"

#include "../common/quantize_lut.h"
#include "binding.h"

EFFVIT_CUDA_OP(quantize_lut, 0, ::effvit::cuda::quantize_lut_impl::launch_quantize_lut_fwd(p, stream), 0, cudaSuccess)
