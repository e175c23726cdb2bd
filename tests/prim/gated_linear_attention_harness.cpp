// C entry to the gated_linear_attention kernels of one element type in the emulator, for tests/test_mutants.py. No
// torch.
#include <cstdio>
#include <stdexcept>

#include "cuda/gated_linear_attention.cuh"

namespace {
struct OneType {
  static constexpr bool kFloat32 = false, kBFloat16 = true, kFloat16 = false;
};
}  // namespace

// sizes: B, L, H, K, V, N, gate, direction. Tensors are contiguous, the gates float32; out and state are written by the
// forward. `message` (of `size` bytes) receives what went wrong.
extern "C" __attribute__((visibility("default"))) void run_gated_linear_attention(const int64_t* sizes, void** tensors,
                                                                                  void* workspace,
                                                                                  int64_t workspace_bytes,
                                                                                  char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  GatedLinearAttentionParams p;
  p.B = sizes[0], p.L = sizes[1], p.H = sizes[2], p.K = sizes[3], p.V = sizes[4], p.N = sizes[5];
  p.gate = static_cast<GateKind>(sizes[6]), p.direction = static_cast<GateDirection>(sizes[7]);
  p.dtype = DType::kBFloat16;
  p.scale = 0.5f;
  p.q = tensors[0], p.k = tensors[1], p.v = tensors[2], p.g = tensors[3];
  p.cu_seqlens = static_cast<const int32_t*>(tensors[4]), p.initial_state = static_cast<const float*>(tensors[5]);
  p.out = tensors[6];
  p.q_stride_h = p.k_stride_h = p.K, p.v_stride_h = p.grad_out_stride_h = p.V;
  p.q_stride_l = p.k_stride_l = p.H * p.K, p.v_stride_l = p.grad_out_stride_l = p.H * p.V;
  p.q_stride_b = p.k_stride_b = p.L * p.H * p.K, p.v_stride_b = p.grad_out_stride_b = p.L * p.H * p.V;
  const int64_t channels = p.gate == GateKind::kChannel ? p.K : 1;
  p.g_stride_h = channels;
  if (p.gate != GateKind::kHead) p.g_stride_l = p.H * channels, p.g_stride_b = p.L * p.H * channels;
  try {
    if (static_cast<int64_t>(gated_linear_attention_fwd_workspace_bytes(p)) > workspace_bytes ||
        static_cast<int64_t>(gated_linear_attention_bwd_workspace_bytes(p)) > workspace_bytes)
      throw std::runtime_error("workspace");
    p.state = static_cast<float*>(tensors[7]);
    if (launch_gated_linear_attention_fwd<OneType>(p, workspace, nullptr) != cudaSuccess)
      throw std::runtime_error("forward");
    p.out = nullptr, p.state = nullptr;
    p.grad_out = tensors[8], p.grad_state = static_cast<const float*>(tensors[9]);
    p.dq = tensors[10], p.dk = tensors[11], p.dv = tensors[12], p.dg = tensors[13];
    p.dinitial_state = static_cast<float*>(tensors[14]);
    if (launch_gated_linear_attention_bwd<OneType>(p, workspace, nullptr) != cudaSuccess)
      throw std::runtime_error("backward");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
