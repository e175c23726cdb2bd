// window_attention on a GPU, and in the emulator. The kernels are in window_attention.cuh.
#include "window_attention.cuh"

#include "../common/window_attention.h"
#include "binding.h"

EFFVIT_CUDA_OP(window_attention, 0, launch_window_attention_fwd(p, stream), window_attention_bwd_workspace_bytes(p),
               launch_window_attention_bwd(p, workspace, stream))
