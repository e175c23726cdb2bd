// Shared by the CUDA bindings: the error of a failed launch.
#pragma once
#include "../common/stable.h"
#include "prim/launch.cuh"

namespace effvit {

inline void check_launch(const char* op, cudaError_t error) {
  check(error == cudaSuccess, op, "kernel launch failed: ", cudaGetErrorString(error));
}

}  // namespace effvit
