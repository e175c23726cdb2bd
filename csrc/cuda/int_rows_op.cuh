// Registers one integer row-wise operator, EFFVIT_OP. CMake writes a .cu per such csrc/rows/<op>.h that includes this.
#pragma once
#include "int_rows.cuh"

#include EFFVIT_ROWS_HEADER
#include "binding.h"

EFFVIT_CUDA_OP(EFFVIT_OP, 0, ::effvit::cuda::EFFVIT_OP::launch_int_rows(p, stream), 0, cudaSuccess)
