// C entry to the fft_conv kernels of one element type in the emulator, for tests/test_mutants.py. No torch.
#include <cstdio>
#include <stdexcept>

#include "cuda/fft_conv.cuh"

namespace {
struct OneType {
  static constexpr bool kFloat32 = true, kBFloat16 = false, kFloat16 = false;
};
}  // namespace

// sizes: B, C, J, channels last, act, then of X, Y, Z each: size, taps of k, taps of k_rev, transform, shift, keep.
// tensors: u, pregate, postgate, k, k_rev, d, spectrum, out, grad_out and the gradients of the first seven; contiguous,
// of float32, null where they are not given. `message` (of `size` bytes) receives what went wrong.
extern "C" __attribute__((visibility("default"))) void run_fft_conv(const int64_t* sizes, void** tensors,
                                                                    void* workspace, int64_t workspace_bytes,
                                                                    char* message, int64_t size) {
  using namespace effvit;
  message[0] = '\0';
  FftConvParams p;
  p.B = sizes[0], p.C = sizes[1], p.J = sizes[2], p.act = static_cast<int32_t>(sizes[4]);
  const int64_t *x = sizes + 5, *y = sizes + 11, *z = sizes + 17;
  p.X = x[0], p.KX = x[1], p.RX = x[2], p.NX = x[3], p.shift_x = x[4], p.keep_x = x[5];
  p.Y = y[0], p.KY = y[1], p.RY = y[2], p.NY = y[3], p.shift_y = y[4], p.keep_y = y[5];
  p.Z = z[0], p.KZ = z[1], p.RZ = z[2], p.NZ = z[3], p.shift_z = z[4], p.keep_z = z[5];
  FftConvStrides& s = p.out_stride;
  s.z = sizes[3] != 0 ? p.C : 1, s.y = s.z * p.Z, s.x = s.y * p.Y;
  s.c = sizes[3] != 0 ? 1 : s.x * p.X, s.b = p.C * p.X * p.Y * p.Z;
  p.u_stride = p.pregate_stride = p.postgate_stride = p.grad_out_stride = s;
  p.u = tensors[0], p.pregate = tensors[1], p.postgate = tensors[2], p.k = tensors[3], p.k_rev = tensors[4];
  p.d = tensors[5], p.spectrum = static_cast<const float*>(tensors[6]);
  p.kernel_scale = p.spectrum == nullptr ? 0.5f : 1.f;
  try {
    if (static_cast<int64_t>(fft_conv_fwd_workspace_bytes(p)) > workspace_bytes ||
        static_cast<int64_t>(fft_conv_bwd_workspace_bytes(p)) > workspace_bytes)
      throw std::runtime_error("workspace");
    p.out = tensors[7];
    if (launch_fft_conv_fwd<OneType>(p, workspace, nullptr) != cudaSuccess) throw std::runtime_error("forward");
    p.out = nullptr, p.grad_out = tensors[8];
    p.du = tensors[9], p.dpregate = tensors[10], p.dpostgate = tensors[11], p.dk = tensors[12];
    p.dk_rev = tensors[13], p.dd = tensors[14], p.dspectrum = static_cast<float*>(tensors[15]);
    if (launch_fft_conv_bwd<OneType>(p, workspace, nullptr) != cudaSuccess) throw std::runtime_error("backward");
  } catch (const std::exception& e) {
    std::snprintf(message, static_cast<size_t>(size), "%s", e.what());
  }
}
