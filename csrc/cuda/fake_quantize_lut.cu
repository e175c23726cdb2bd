// fake_quantize_lut on a GPU, and in the emulator. The kernel is in lut.cuh.
#include "fake_quantize_lut.cuh"

#include "../common/fake_quantize_lut.h"
#include "binding.h"

EFFVIT_CUDA_OP(fake_quantize_lut, 0, ::effvit::cuda::fake_quantize_lut_impl::launch_fake_quantize_lut_fwd(p, stream), 0,
               cudaSuccess)
