// Element types as plain data, and the marker of functions that run on the host and on a GPU. No torch, no CUDA.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define EFFVIT_HD __host__ __device__ __forceinline__
#else
#define EFFVIT_HD inline
#endif

namespace effvit {

// The first three are those of the tensors that are computed with; all but the last are what an option
// `out_dtype` counts; kOther is anything that no operator takes.
enum class DType : int32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kInt32 = 3,
  kInt8 = 4,
  kUInt8 = 5,
  kInt16 = 6,
  kOther = 7
};

EFFVIT_HD int64_t element_bytes(DType type) {
  return type == DType::kFloat32 || type == DType::kInt32 ? 4 : type == DType::kInt8 || type == DType::kUInt8 ? 1 : 2;
}

}  // namespace effvit
