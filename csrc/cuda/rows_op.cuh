// Registers one row-wise operator, EFFVIT_OP. CMake writes a .cu per csrc/rows/<op>.h that includes this.
#pragma once
#include "rows.cuh"

#include EFFVIT_ROWS_HEADER
#include "binding.h"

EFFVIT_CUDA_OP(EFFVIT_OP, 0, ::effvit::cuda::EFFVIT_OP::launch_rows<::effvit::cuda::EFFVIT_OP::Forward>(p, stream), 0,
               ::effvit::cuda::EFFVIT_OP::launch_rows<::effvit::cuda::EFFVIT_OP::Backward>(p, stream))
