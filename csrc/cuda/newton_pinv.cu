// newton_pinv on a GPU, and in the emulator. The kernels are in newton_pinv.cuh.
#include "newton_pinv.cuh"

#include "../common/newton_pinv.h"
#include "binding.h"

EFFVIT_CUDA_OP(newton_pinv, newton_pinv_fwd_workspace_bytes(p), launch_newton_pinv_fwd(p, workspace, stream),
               newton_pinv_bwd_workspace_bytes(p), launch_newton_pinv_bwd(p, workspace, stream))
