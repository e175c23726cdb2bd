// C entry to the rbf_gram kernels in the emulator, for tests/test_mutants.py. No torch.
#include <cstdio>
#include <stdexcept>

#include "cuda/rbf_gram.cuh"

// sizes: B, L, M, H, D, dtype. tensors: q, k, out, grad_out, dq, dk, contiguous; out is written by the forward and read
// by the backward. `message` (of `size` bytes) receives what went wrong, or stays empty.
extern "C" __attribute__((visibility("default"))) void run_rbf_gram(const int64_t* sizes, void** tensors,
                                                                    void* workspace, int64_t workspace_bytes,
                                                                    char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  RbfGramParams p;
  p.B = sizes[0], p.L = sizes[1], p.M = sizes[2], p.H = sizes[3], p.D = sizes[4];
  p.dtype = static_cast<DType>(sizes[5]);
  p.gamma = 0.75f;
  p.q = tensors[0], p.k = tensors[1], p.out = tensors[2], p.grad_out = tensors[3], p.dq = tensors[4];
  p.dk = tensors[5];
  p.q_stride_h = p.k_stride_h = p.D, p.q_stride_l = p.k_stride_l = p.H * p.D;
  p.q_stride_b = p.L * p.q_stride_l, p.k_stride_b = p.M * p.k_stride_l;
  p.grad_out_stride_l = p.M, p.grad_out_stride_h = p.L * p.M, p.grad_out_stride_b = p.H * p.L * p.M;
  try {
    if (launch_rbf_gram_fwd(p, nullptr) != cudaSuccess) throw std::runtime_error("forward");
    if (static_cast<int64_t>(rbf_gram_bwd_workspace_bytes(p)) > workspace_bytes) throw std::runtime_error("workspace");
    if (launch_rbf_gram_bwd(p, workspace, nullptr) != cudaSuccess) throw std::runtime_error("backward");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
