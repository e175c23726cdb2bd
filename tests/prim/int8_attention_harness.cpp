// C entry to the int8_attention kernels in the emulator, for tests/test_mutants.py. No torch.
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "cuda/int8_attention.cuh"

// sizes: B, L, H, K, M, G, V, W, elements between rows of a tensor, dtype of q, of k and v, of the bias, causal,
// shiftmax. tensors: q, k, v, k_scale, v_scale, k_mean, bias, out, lse; those that are not given are null. Rows of q, k
// and v are K, K and V elements and the gap. `message` (of `size` bytes) receives what went wrong, or stays empty.
extern "C" __attribute__((visibility("default"))) void run_int8_attention(const int64_t* sizes, void** tensors,
                                                                          double scale, char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  Int8AttentionParams p;
  p.B = sizes[0], p.L = sizes[1], p.H = sizes[2], p.K = sizes[3], p.M = sizes[4], p.G = sizes[5], p.V = sizes[6];
  p.W = sizes[7], p.N = (p.M + kAttentionBlock - 1) / kAttentionBlock;
  const int64_t q_row = p.K + sizes[8], v_row = p.V + sizes[8];
  p.q_stride_h = q_row, p.q_stride_l = p.H * q_row, p.q_stride_b = p.L * p.q_stride_l;
  p.k_stride_h = q_row, p.k_stride_m = p.G * q_row, p.k_stride_b = p.M * p.k_stride_m;
  p.v_stride_h = v_row, p.v_stride_m = p.G * v_row, p.v_stride_b = p.M * p.v_stride_m;
  p.bias_stride_l = p.M, p.bias_stride_h = p.L * p.M, p.bias_stride_w = p.H * p.bias_stride_h;
  p.dtype = static_cast<DType>(sizes[9]), p.kv_dtype = static_cast<DType>(sizes[10]);
  p.bias_dtype = static_cast<DType>(sizes[11]);
  p.causal = sizes[12] != 0, p.shiftmax = sizes[13] != 0;
  p.scale = static_cast<float>(scale), p.base2_scale = static_cast<float>(scale * 1.4426950408889634);
  if (p.shiftmax) p.step = static_cast<float>(8192.0 * 0.6931471805599453);
  p.q = tensors[0], p.k = tensors[1], p.v = tensors[2];
  p.k_scale = static_cast<const float*>(tensors[3]), p.v_scale = static_cast<const float*>(tensors[4]);
  p.k_mean = static_cast<const float*>(tensors[5]), p.bias = tensors[6];
  p.out = tensors[7], p.lse = static_cast<float*>(tensors[8]);
  try {
    std::vector<uint64_t> workspace(int8_attention_fwd_workspace_bytes(p) / 8 + 2);
    void* const aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 15) / 16 * 16);
    if (launch_int8_attention_fwd(p, aligned, nullptr) != cudaSuccess) throw std::runtime_error("launch");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
