// gated_linear_attention on a GPU, and in the emulator. The kernels are in gated_linear_attention.cuh.
#include "gated_linear_attention.cuh"

#include "../common/gated_linear_attention.h"
#include "binding.h"

EFFVIT_CUDA_OP(gated_linear_attention, gated_linear_attention_fwd_workspace_bytes(p),
               launch_gated_linear_attention_fwd(p, workspace, stream), gated_linear_attention_bwd_workspace_bytes(p),
               launch_gated_linear_attention_bwd(p, workspace, stream))
