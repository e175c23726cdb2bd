// Sizes and strides of fft_conv, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include <initializer_list>

#include "dtype.h"

namespace effvit {

// In elements: of a map [B, C, X, Y, Z], in whichever order it lies in memory.
struct FftConvStrides {
  int64_t b = 0, c = 0, x = 0, y = 0, z = 0;
};

// Inputs of rank 1 are Z alone, of rank 2 Y and Z: the axes that are not there have size 1 and one tap, and are
// circular, so that their transform is of size 1 too.
//   u' = pregate u;   out = postgate act(y + d u');   y = the inverse transform of U' K, cropped to [0, X) x ...
// Row b of the batch has kernel b % J. A transform along an axis has size N: of circular axes the axis's own, else that
// of the spectrum that is given, else fft_conv_size(S + max(K, R) - 1). Where keep is 0 for all axes a kernel may take
// another size from S + max(K - 1 - shift, shift, R - 1) on, or none at all: the result is the same convolution.
struct FftConvParams {
  const void* u = nullptr;  // [B, C, X, Y, Z], strides `u_stride`
  const void* pregate = nullptr;  // like u; null: 1
  const void* postgate = nullptr;  // like u; null: 1
  const void* k = nullptr;  // [J, C, KX, KY, KZ], contiguous: tap j at lag j - shift; null where spectrum is given
  const void* k_rev = nullptr;  // [J, C, RX, RY, RZ], contiguous: tap j at lag -j; null: none
  const void* d = nullptr;  // [C], contiguous; null: 0
  const float* spectrum = nullptr;  // [J, C, NX, NY, NZ/2 + 1, 2]: real and imaginary parts, contiguous; null: of k
  void* out = nullptr;  // [B, C, X, Y, Z], strides `out_stride`

  // Backward only. Gradients are null exactly where what they are the gradients of is.
  const void* grad_out = nullptr;  // [B, C, X, Y, Z], strides `grad_out_stride`
  void* du = nullptr;  // [B, C, X, Y, Z], strides `out_stride`
  void* dpregate = nullptr;  // the same
  void* dpostgate = nullptr;  // the same
  void* dk = nullptr;  // [J, C, KX, KY, KZ], contiguous, k's dtype
  void* dk_rev = nullptr;  // [J, C, RX, RY, RZ], contiguous, k_rev's dtype
  void* dd = nullptr;  // [C], d's dtype
  float* dspectrum = nullptr;  // [J, C, NX, NY, NZ/2 + 1, 2], contiguous

  int64_t B = 0, C = 0, X = 1, Y = 1, Z = 1;
  int64_t J = 1;  // kernels: 1, or a divisor of B (B itself where B is 0)
  int64_t KX = 1, KY = 1, KZ = 1, RX = 1, RY = 1, RZ = 1;  // 1 where k or k_rev is not given
  int64_t NX = 1, NY = 1, NZ = 1;
  FftConvStrides u_stride, pregate_stride, postgate_stride, grad_out_stride;
  FftConvStrides out_stride;  // of out and of the gradients of maps: contiguous, channels first or last

  int32_t mode_x = 2, mode_y = 2, mode_z = 0;  // 0 causal, 1 same, 2 circular
  int64_t shift_x = 0, shift_y = 0, shift_z = 0;  // (K - 1) / 2 where the mode is "same", else 0
  int64_t keep_x = 0, keep_y = 0, keep_z = 0;  // zero where the absolute frequency is this or more; 0: all are kept
  int32_t act = 0;  // 0 none, 1 gelu, 2 silu
  float kernel_scale = 1.f;  // of k and k_rev; 1 where spectrum is given
  DType dtype = DType::kFloat32;  // of every map
  DType k_dtype = DType::kFloat32, k_rev_dtype = DType::kFloat32, d_dtype = DType::kFloat32;
};

// The smallest even number from n on whose prime factors are 2, 3, 5 and 7.
inline int64_t fft_conv_size(int64_t n) {
  for (int64_t size = n < 2 ? 2 : n + n % 2;; size += 2) {
    int64_t rest = size;
    for (const int64_t prime : {2, 3, 5, 7}) {
      while (rest % prime == 0) rest /= prime;
    }
    if (rest == 1) return size;
  }
}

}  // namespace effvit
