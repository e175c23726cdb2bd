// int8_attention on a GPU, and in the emulator. The kernels are in int8_attention.cuh.
#include "int8_attention.cuh"

#include "../common/int8_attention.h"
#include "binding.h"

EFFVIT_CUDA_OP(int8_attention, int8_attention_fwd_workspace_bytes(p), launch_int8_attention_fwd(p, workspace, stream),
               0, cudaSuccess)
