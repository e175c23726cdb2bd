// rbf_gram on a GPU, and in the emulator. The kernels are in rbf_gram.cuh.
#include "rbf_gram.cuh"

#include "../common/rbf_gram.h"
#include "binding.h"

EFFVIT_CUDA_OP(rbf_gram, 0, launch_rbf_gram_fwd(p, stream), rbf_gram_bwd_workspace_bytes(p),
               launch_rbf_gram_bwd(p, workspace, stream))
