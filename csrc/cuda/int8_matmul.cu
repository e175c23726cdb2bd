// int8_matmul on a GPU, and in the emulator.
#include "int8_matmul.cuh"

#include "../common/int8_matmul.h"
#include "binding.h"

EFFVIT_CUDA_OP(int8_matmul, 0, launch_int8_matmul_fwd(p, stream), 0, cudaSuccess)
