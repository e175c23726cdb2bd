// dequantize_lut on a GPU, and in the emulator. The kernel is in lut.cuh.
#include "dequantize_lut.cuh"

#include "../common/dequantize_lut.h"
#include "binding.h"

EFFVIT_CUDA_OP(dequantize_lut, 0, ::effvit::cuda::dequantize_lut_impl::launch_dequantize_lut_fwd(p, stream), 0,
               cudaSuccess)
