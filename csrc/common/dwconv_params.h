// Sizes and strides of dwconv, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include "dtype.h"

namespace effvit {

// Windows are maps of their own: there are windows_y x windows_x of them, H x W each, side by side in an image.
struct DwconvParams {
  const void* x = nullptr;  // [B, windows_y * H, windows_x * W, C], last stride 1
  const void* weight = nullptr;  // [C, kh, kw], contiguous
  const void* bias = nullptr;  // [C], contiguous, or null
  const void* pregate = nullptr;  // as x, or null
  const void* postgate = nullptr;  // [B, windows_y * P, windows_x * Q, C], last stride 1, or null
  const void* state = nullptr;  // [B, H, pad_x, C], last stride 1, or null: the columns left of x
  void* out = nullptr;  // as postgate, contiguous

  // Backward only; gradients are contiguous.
  const void* grad_out = nullptr;  // as postgate
  void* dx = nullptr;
  void* dweight = nullptr;
  void* dbias = nullptr;
  void* dpregate = nullptr;
  void* dpostgate = nullptr;
  void* dstate = nullptr;

  int64_t B = 0, windows_y = 1, windows_x = 1, H = 0, W = 0, P = 0, Q = 0, C = 0;
  int64_t kh = 1, kw = 1, pad_y = 0, pad_x = 0, step_y = 1, step_x = 1;  // steps: distances of taps
  int64_t x_stride_b = 0, x_stride_y = 0, x_stride_x = 0;
  int64_t pregate_stride_b = 0, pregate_stride_y = 0, pregate_stride_x = 0;
  int64_t postgate_stride_b = 0, postgate_stride_y = 0, postgate_stride_x = 0;
  int64_t state_stride_b = 0, state_stride_y = 0, state_stride_x = 0;
  int64_t grad_out_stride_b = 0, grad_out_stride_y = 0, grad_out_stride_x = 0;

  // Of what is contiguous: out and dpostgate; dx and dpregate.
  int64_t out_stride_b = 0, out_stride_y = 0, out_stride_x = 0;
  int64_t dx_stride_b = 0, dx_stride_y = 0, dx_stride_x = 0;

  int32_t act = 5;  // 0 sigmoid, 1 gelu, 2 silu, 3 relu, 4 tanh, 5 none
  DType dtype = DType::kFloat32;  // of every map
  DType weight_dtype = DType::kFloat32, bias_dtype = DType::kFloat32;
};

}  // namespace effvit
