// fft_conv on a GPU, and in the emulator. The kernels are in fft_conv.cuh.
#include "fft_conv.cuh"

#include "../common/fft_conv.h"
#include "binding.h"

EFFVIT_CUDA_OP(fft_conv, fft_conv_fwd_workspace_bytes(p), launch_fft_conv_fwd(p, workspace, stream),
               fft_conv_bwd_workspace_bytes(p), launch_fft_conv_bwd(p, workspace, stream))
