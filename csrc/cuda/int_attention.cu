// int_attention on a GPU, and in the emulator.
#include "int_attention.cuh"

#include "../common/int_attention.h"
#include "binding.h"

EFFVIT_CUDA_OP(int_attention, 0, launch_int_attention_fwd(p, stream), 0, cudaSuccess)
