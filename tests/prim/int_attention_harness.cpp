// C entry to the int_attention kernels in the emulator, for tests/test_mutants.py. No torch.
#include <cstdio>
#include <stdexcept>

#include "cuda/int_attention.cuh"

// sizes: B, L, M, H, K, V, W, elements between rows of q, k and v, n, x, magic, its shift, wide, bits; multiplier,
// shift and ends of the scores and of the result, its dtype. tensors: q, k, v, bias (or null), out.
extern "C" __attribute__((visibility("default"))) void run_int_attention(const int64_t* sizes, void** tensors,
                                                                         char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  IntAttentionParams p;
  p.B = sizes[0], p.L = sizes[1], p.M = sizes[2], p.H = sizes[3], p.K = sizes[4], p.V = sizes[5], p.W = sizes[6];
  const int64_t gap = sizes[7];
  p.q_stride_h = p.k_stride_h = p.K + gap, p.v_stride_h = p.V + gap;
  p.q_stride_l = p.k_stride_l = p.H * p.q_stride_h, p.v_stride_l = p.H * p.v_stride_h;
  p.q_stride_b = p.L * p.q_stride_l, p.k_stride_b = p.M * p.k_stride_l, p.v_stride_b = p.M * p.v_stride_l;
  p.bias_stride_l = p.M, p.bias_stride_h = p.L * p.M, p.bias_stride_w = p.H * p.L * p.M;
  p.exp.n = static_cast<uint32_t>(sizes[8]), p.exp.x = static_cast<uint32_t>(sizes[9]), p.exp.limit = p.exp.n * p.exp.x;
  p.exp.magic = static_cast<uint32_t>(sizes[10]), p.exp.shift = static_cast<uint32_t>(sizes[11]);
  p.exp.wide = sizes[12] != 0, p.bits = static_cast<int32_t>(sizes[13]);
  const auto rescale = [](const int64_t* s) {
    return Rescale{static_cast<int32_t>(s[0]), static_cast<int32_t>(s[1]), static_cast<int32_t>(s[2]),
                   static_cast<int32_t>(s[3])};
  };
  p.scores = rescale(sizes + 14), p.rescale = rescale(sizes + 18);
  p.out_dtype = static_cast<DType>(sizes[22]);
  p.q = static_cast<const int8_t*>(tensors[0]), p.k = static_cast<const int8_t*>(tensors[1]);
  p.v = static_cast<const int8_t*>(tensors[2]), p.bias = static_cast<const int32_t*>(tensors[3]), p.out = tensors[4];
  try {
    if (launch_int_attention_fwd(p, nullptr) != cudaSuccess) throw std::runtime_error("launch");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
