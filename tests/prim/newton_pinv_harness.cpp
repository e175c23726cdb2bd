// C entry to the newton_pinv kernels in the emulator, for tests/test_mutants.py. No torch.
#include <cstdio>
#include <stdexcept>

#include "cuda/newton_pinv.cuh"

// sizes: B, H, m, steps, dtype. tensors: a, out, grad_out, da, contiguous; out is written by the forward and read by
// the backward. `message` (of `size` bytes) receives what went wrong, or stays empty.
extern "C" __attribute__((visibility("default"))) void run_newton_pinv(const int64_t* sizes, void** tensors,
                                                                       void* workspace, int64_t workspace_bytes,
                                                                       char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  NewtonPinvParams p;
  p.B = sizes[0], p.H = sizes[1], p.m = sizes[2];
  p.iterations = static_cast<int32_t>(sizes[3]);
  p.dtype = static_cast<DType>(sizes[4]);
  p.ridge = 0.5f, p.step = 1.5f;
  p.a = tensors[0], p.out = tensors[1], p.grad_out = tensors[2], p.da = tensors[3];
  p.a_stride_i = p.grad_out_stride_i = p.m, p.a_stride_h = p.grad_out_stride_h = p.m * p.m;
  p.a_stride_b = p.grad_out_stride_b = p.H * p.a_stride_h;
  try {
    const size_t forward = newton_pinv_fwd_workspace_bytes(p), backward = newton_pinv_bwd_workspace_bytes(p);
    if (static_cast<int64_t>(forward < backward ? backward : forward) > workspace_bytes)
      throw std::runtime_error("workspace");
    if (launch_newton_pinv_fwd(p, workspace, nullptr) != cudaSuccess) throw std::runtime_error("forward");
    if (launch_newton_pinv_bwd(p, workspace, nullptr) != cudaSuccess) throw std::runtime_error("backward");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
