// C entry to the linear attention kernels of one element type in the emulator, for tests/test_mutants.py. No torch.
#include <cstdio>
#include <stdexcept>

#include "cuda/linear_attention.cuh"

namespace {
struct OneType {
  static constexpr bool kFloat32 = false, kBFloat16 = true, kFloat16 = false;
};
}  // namespace

// sizes: B, L, M, H, K, V, feature map, normaliser, causal, quadratic. Tensors are contiguous; out, state and z are
// written by the forward, and state and z read by the backward. `message` (of `size` bytes) receives what went wrong.
extern "C" __attribute__((visibility("default"))) void run_linear_attention(const int64_t* sizes, void** tensors,
                                                                            void* workspace, int64_t workspace_bytes,
                                                                            char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  LinearAttentionParams p;
  p.B = p.N = sizes[0], p.L = sizes[1], p.M = sizes[2], p.H = sizes[3], p.K = sizes[4], p.V = sizes[5];
  p.feature_map = static_cast<FeatureMap>(sizes[6]), p.normalize = static_cast<Normalize>(sizes[7]);
  p.causal = sizes[8] != 0, p.quadratic = sizes[9] != 0;
  p.dtype = DType::kBFloat16;
  p.eps = 0.01f, p.scale = 0.5f;
  p.q = tensors[0], p.k = tensors[1], p.v = tensors[2], p.weight = tensors[3], p.q_den = tensors[4];
  p.out = tensors[5], p.state = static_cast<float*>(tensors[6]), p.z = static_cast<float*>(tensors[7]);
  p.grad_out = tensors[8], p.dq = tensors[9], p.dk = tensors[10], p.dv = tensors[11], p.dweight = tensors[12];
  p.dq_den = tensors[13];
  p.q_stride_h = p.k_stride_h = p.q_den_stride_h = p.K, p.v_stride_h = p.grad_out_stride_h = p.V;
  p.q_stride_l = p.k_stride_l = p.q_den_stride_l = p.H * p.K, p.v_stride_l = p.grad_out_stride_l = p.H * p.V;
  p.q_stride_b = p.q_den_stride_b = p.L * p.q_stride_l, p.k_stride_b = p.M * p.k_stride_l;
  p.v_stride_b = p.M * p.v_stride_l, p.grad_out_stride_b = p.L * p.grad_out_stride_l;
  p.weight_stride_h = 1, p.weight_stride_l = p.H, p.weight_stride_b = p.M * p.H;
  try {
    if (static_cast<int64_t>(linear_attention_fwd_workspace_bytes(p)) > workspace_bytes ||
        static_cast<int64_t>(linear_attention_bwd_workspace_bytes(p)) > workspace_bytes)
      throw std::runtime_error("workspace");
    if (launch_linear_attention_fwd<OneType>(p, workspace, nullptr) != cudaSuccess) throw std::runtime_error("forward");
    if (launch_linear_attention_bwd<OneType>(p, workspace, nullptr) != cudaSuccess)
      throw std::runtime_error("backward");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
