// Which of CUTLASS's kernels takes a call, or why none does: a rule of shapes, strides and addresses. No CUTLASS, no
// CUDA: explain and the tests go by it where there is no GPU.
#pragma once
#include "../../common/sparse24_int8_linear_params.h"

namespace effvit {
namespace cuda {

enum class CutlassArch : int32_t { kSm80 = 0, kSm90 = 1 };
constexpr int kCutlassArchs = 2;
constexpr int kCutlassOutputs = 5;  // places by DType; that of int32 stays empty
constexpr int64_t kCutlassTile = 128;

namespace cutlass_impl {

constexpr int64_t kMultiprocessors = 132;  // a constant, as target_ctas() is
constexpr int64_t kMostRows = 1 << 22;  // so that grids of any shape fit

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
inline int64_t tiles(int64_t n) { return (n + kCutlassTile - 1) / kCutlassTile; }

// Null: nothing speaks against it.
inline const char* common_obstacle(const Int8Epilogue& p, const int8_t* x, int64_t x_stride, int64_t K,
                                   CutlassArch arch) {
  if (p.out_dtype == DType::kInt32) return "out_dtype is int32";
  if (p.M <= kCutlassTile / 2 || p.N <= kCutlassTile / 2 || tiles(p.M) * tiles(p.N) < kMultiprocessors)
    return "tiles of 128 x 128 would not occupy the GPU";
  if (p.M > kMostRows || p.N > kMostRows) return "M or N is above 4194304";
  if (!aligned(x, 16) || x_stride % 16 != 0) return "rows of x are not aligned to 16 bytes";
  if (x_stride < K) return "rows of x overlap";
  if (arch == CutlassArch::kSm90 && (!aligned(p.out, 16) || p.N * element_bytes(p.out_dtype) % 16 != 0))
    return "rows of the output are not multiples of 16 bytes";
  return nullptr;
}

}  // namespace cutlass_impl

inline const char* cutlass_obstacle(const Int8LinearParams& p, CutlassArch arch) {
  using namespace cutlass_impl;
  if (const char* obstacle = common_obstacle(p, p.x, p.x_stride_m, p.K, arch)) return obstacle;
  if (p.packed) return "weight is packed";
  if (p.K % 16 != 0 || p.K == 0) return "K is not a multiple of 16";
  if (!aligned(p.weight, 16) || p.weight_stride_n % 16 != 0) return "rows of weight are not aligned to 16 bytes";
  if (p.weight_stride_n < p.K) return "rows of weight overlap";
  return nullptr;
}

// What is not said here of sm_90: metadata are repacked, and padded where that pads.
inline const char* cutlass_obstacle(const Sparse24Int8LinearParams& p, CutlassArch arch) {
  using namespace cutlass_impl;
  if (const char* obstacle = common_obstacle(p, p.x, p.x_stride_m, p.K, arch)) return obstacle;
  if (p.meta == nullptr) return "values are packed";
  if (p.K == 0 || p.K % 32 != 0) return "K is not a multiple of 32";
  if (!aligned(p.values, 16)) return "rows of values are not aligned to 16 bytes";
  if (!aligned(p.meta, 4)) return "meta is not aligned to 4 bytes";
  if (arch == CutlassArch::kSm90) {
    if (p.values_stride_n != p.K / 2) return "values are not contiguous";
    return nullptr;
  }
  if (p.values_stride_n % 16 != 0) return "rows of values are not aligned to 16 bytes";
  if (p.values_stride_n < p.K / 2) return "rows of values overlap";
  // Beyond the end the kernel reads metadata of 0, which are undefined; rows are regrouped by 16.
  if (p.K % 128 != 0) return "K is not a multiple of 128, as sm_80's kernel needs";
  if (p.N % 16 != 0) return "N is not a multiple of 16, as sm_80's kernel needs";
  return nullptr;
}

// Of metadata in the order of an architecture, which the kernel reads instead of p.meta: formats sm80 and sm90 of
// effvit.sparse24_formats.
inline int64_t cutlass_meta_bytes(int64_t N, int64_t K, CutlassArch arch) {
  if (arch == CutlassArch::kSm80) return (N + 15) / 16 * 16 * ((K + 63) / 64 * 8);
  return (N + 63) / 64 * 64 * ((K + 127) / 128 * 16);
}

}  // namespace cuda
}  // namespace effvit
