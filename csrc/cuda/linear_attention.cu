// linear_attention on a GPU, and in the emulator. The kernels are in linear_attention.cuh.
#include "linear_attention.cuh"

#include "../common/linear_attention.h"
#include "binding.h"

EFFVIT_CUDA_OP(linear_attention, linear_attention_fwd_workspace_bytes(p),
               launch_linear_attention_fwd(p, workspace, stream), linear_attention_bwd_workspace_bytes(p),
               launch_linear_attention_bwd(p, workspace, stream))
