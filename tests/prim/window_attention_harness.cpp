// C entry to the window attention kernels of one element type in the emulator, for tests/test_mutants.py. No torch.
#include <cstdio>
#include <stdexcept>

#include "cuda/window_attention.cuh"

namespace {
struct OneType {
  static constexpr bool kFloat32 = false, kBFloat16 = true, kFloat16 = false;
};
}  // namespace

// sizes: B, H, W, h, d, dv, window, shift, dilation, halo (two each). Tensors are contiguous; out and lse are written
// by the forward and read by the backward. `message` (of `size` bytes) receives what went wrong, or stays empty.
extern "C" __attribute__((visibility("default"))) void run_window_attention(const int64_t* sizes, void** tensors,
                                                                            void* workspace, int64_t workspace_bytes,
                                                                            char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  WindowAttentionParams p;
  p.B = sizes[0], p.H = sizes[1], p.W = sizes[2], p.h = sizes[3], p.d = sizes[4], p.dv = sizes[5];
  int32_t* const pairs[] = {&p.window_h,   &p.window_w,   &p.shift_h, &p.shift_w,
                            &p.dilation_h, &p.dilation_w, &p.halo_h,  &p.halo_w};
  for (int i = 0; i < 8; ++i) *pairs[i] = static_cast<int32_t>(sizes[6 + i]);
  p.dtype = DType::kBFloat16;
  p.scale = 0.25f;
  p.mask_value = -2.f;  // small: a key that must not be one shows
  p.q = tensors[0], p.k = tensors[1], p.v = tensors[2], p.bias_table = tensors[3];
  p.logit_scale = tensors[4], p.pad_k = tensors[5], p.pad_v = tensors[6];
  p.out = tensors[7], p.lse = static_cast<float*>(tensors[8]), p.grad_out = tensors[9];
  p.dq = tensors[10];  // [B, H, W, h * (2 * d + dv)]: dq [h, d], then dk [h, d], then dv [h, dv]
  p.dk = static_cast<char*>(p.dq) + 2 * p.h * p.d, p.dvalue = static_cast<char*>(p.dk) + 2 * p.h * p.d;
  p.dq_stride_t = p.dk_stride_t = p.dvalue_stride_t = p.h * (2 * p.d + p.dv);
  p.dbias_table = tensors[11], p.dlogit_scale = tensors[12], p.dpad_k = tensors[13], p.dpad_v = tensors[14];
  p.q_stride_h = p.k_stride_h = p.d, p.v_stride_h = p.grad_out_stride_h = p.dv;
  p.q_stride_x = p.k_stride_x = p.h * p.d, p.v_stride_x = p.grad_out_stride_x = p.h * p.dv;
  p.q_stride_y = p.k_stride_y = p.W * p.q_stride_x, p.v_stride_y = p.grad_out_stride_y = p.W * p.v_stride_x;
  p.q_stride_b = p.k_stride_b = p.H * p.q_stride_y, p.v_stride_b = p.grad_out_stride_b = p.H * p.v_stride_y;
  p.bias_stride_x = 1;
  p.bias_stride_y = 2 * p.window_w - 1 + 2 * p.halo_w;
  p.bias_stride_h = (2 * p.window_h - 1 + 2 * p.halo_h) * p.bias_stride_y;
  try {
    if (launch_window_attention_fwd<OneType>(p, nullptr) != cudaSuccess) throw std::runtime_error("forward");
    if (static_cast<int64_t>(window_attention_bwd_workspace_bytes<OneType>(p)) > workspace_bytes)
      throw std::runtime_error("workspace");
    if (launch_window_attention_bwd<OneType>(p, workspace, nullptr) != cudaSuccess)
      throw std::runtime_error("backward");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
