// Sizes and strides of window_attention, by name. Plain data: no torch, no CUDA; passed by value to every kernel.
#pragma once
#include "dtype.h"

namespace effvit {

struct WindowAttentionParams {
  // Inputs. A null pointer means that the argument was not given. All strides are in elements.
  const void* q = nullptr;  // [B, H, W, h, d], last stride 1
  const void* k = nullptr;  // [B, H, W, h, d], last stride 1
  const void* v = nullptr;  // [B, H, W, h, dv], last stride 1
  const void* bias_table = nullptr;  // [h, 2*wh-1+2*halo_h, 2*ww-1+2*halo_w], any strides, bias_dtype
  const void* logit_scale = nullptr;  // [h], contiguous, logit_scale_dtype
  const void* pad_k = nullptr;  // [h, d], contiguous, dtype of q
  const void* pad_v = nullptr;  // [h, dv], contiguous, dtype of q

  // Outputs of forward; inputs of backward.
  void* out = nullptr;  // [B, H, W, h, dv], contiguous
  float* lse = nullptr;  // [B, h, H, W], contiguous, natural log

  // Backward only.
  const void* grad_out = nullptr;  // [B, H, W, h, dv], last stride 1
  const float* grad_lse = nullptr;  // [B, h, H, W], contiguous, may be null
  // Token t (a flat index into [B, H, W]) of head j is at dq + t * dq_stride_t + j *
  // d, of dk likewise, of the values at dvalue + t * dvalue_stride_t + j * dv.
  void* dq = nullptr;
  void* dk = nullptr;
  void* dvalue = nullptr;
  void* dbias_table = nullptr;  // [h, 2*wh-1+2*halo_h, 2*ww-1+2*halo_w], contiguous, bias_dtype
  void* dlogit_scale = nullptr;  // [h], logit_scale_dtype
  void* dpad_k = nullptr;  // [h, d], contiguous, dtype of q
  void* dpad_v = nullptr;  // [h, dv], contiguous, dtype of q

  int64_t B = 0, H = 0, W = 0, h = 0, d = 0, dv = 0;
  int64_t q_stride_b = 0, q_stride_y = 0, q_stride_x = 0, q_stride_h = 0;
  int64_t k_stride_b = 0, k_stride_y = 0, k_stride_x = 0, k_stride_h = 0;
  int64_t v_stride_b = 0, v_stride_y = 0, v_stride_x = 0, v_stride_h = 0;
  int64_t grad_out_stride_b = 0, grad_out_stride_y = 0, grad_out_stride_x = 0, grad_out_stride_h = 0;
  int64_t dq_stride_t = 0, dk_stride_t = 0, dvalue_stride_t = 0;
  int64_t bias_stride_h = 0, bias_stride_y = 0, bias_stride_x = 0;

  int32_t window_h = 1, window_w = 1;
  int32_t shift_h = 0, shift_w = 0;
  int32_t dilation_h = 1, dilation_w = 1;
  int32_t halo_h = 0, halo_w = 0;
  float scale = 1.f;  // used when logit_scale is null
  float mask_value = -100.f;
  bool roll_before_pad = false;
  DType dtype = DType::kFloat32;  // q, k, v, pad_k, pad_v, out, grad_out, dq, dk, dvalue
  DType bias_dtype = DType::kFloat32;
  DType logit_scale_dtype = DType::kFloat32;
};

// Index arithmetic of one axis. i runs over the rolled, padded axis; see reference/window_attention.py:axis_layout.
struct WindowAxis {
  int32_t size, window, shift, dilation, halo, extent, padded, windows;
  bool roll_before_pad;
};

EFFVIT_HD WindowAxis make_window_axis(int64_t size, int32_t window, int32_t shift, int32_t dilation, int32_t halo,
                                      bool roll_before_pad) {
  WindowAxis a;
  a.size = static_cast<int32_t>(size);
  a.window = window;
  a.shift = shift;
  a.dilation = dilation;
  a.halo = halo;
  a.extent = window * dilation;
  a.padded = (a.size + a.extent - 1) / a.extent * a.extent;
  a.windows = a.padded / window;  // blocks * dilation phases
  a.roll_before_pad = roll_before_pad;
  return a;
}

// Rolled coordinate of token `local` (in [-halo, window + halo)) of window `w` of this axis.
EFFVIT_HD int32_t rolled_coordinate(const WindowAxis& a, int32_t w, int32_t local) {
  const int32_t block = w / a.dilation, phase = w - block * a.dilation;
  return block * a.extent + local * a.dilation + phase;
}

// Position on the map of rolled coordinate i, or -1 for a token outside the map.
EFFVIT_HD int32_t map_position(const WindowAxis& a, int32_t i) {
  if (i < 0 || i >= a.padded) return -1;
  int32_t p = i + a.shift;
  if (a.roll_before_pad) {
    if (i >= a.size) return -1;
    while (p >= a.size) p -= a.size;
    return p;
  }
  if (p >= a.padded) p -= a.padded;
  return p < a.size ? p : -1;
}

// Shift region of rolled coordinate i: pairs of tokens from different regions get mask_value.
EFFVIT_HD int32_t shift_region(const WindowAxis& a, int32_t i) {
  return a.shift == 0 ? 0 : (i >= a.padded - a.extent) + (i >= a.padded - a.shift);
}

}  // namespace effvit
