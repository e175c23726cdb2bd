// The CUTLASS kernels of this library, by architecture, operator and dtype of the output. No CUTLASS, no torch.
#pragma once
#include <cuda_runtime.h>

#include "choice.h"

namespace effvit {
namespace cuda {

using CutlassDense = cudaError_t (*)(const Int8LinearParams&, cudaStream_t);
using CutlassSparse = cudaError_t (*)(const Sparse24Int8LinearParams&, const void* meta, cudaStream_t);

// Null: not built. Files of kernels fill their places while the library is loaded; zeros come before that.
struct CutlassKernels {
  CutlassDense dense[kCutlassOutputs];
  CutlassSparse sparse[kCutlassOutputs];
};
CutlassKernels& cutlass_kernels(CutlassArch arch);

}  // namespace cuda
}  // namespace effvit
