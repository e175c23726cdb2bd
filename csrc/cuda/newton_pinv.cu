// newton_pinv on a GPU, and in the emulator: binding. The kernels are in newton_pinv.cuh.
#include "newton_pinv.cuh"

#include "../common/newton_pinv_binding.h"
#include "binding.h"

namespace effvit {
namespace {

Tensor workspace_of(const Tensor& like, size_t bytes) {
  return empty(like, {static_cast<int64_t>(bytes / sizeof(float))}, ScalarType::Float);
}

Tensor newton_pinv(Tensor a, int64_t iterations, double ridge, double step) {
  constexpr const char* kOp = "newton_pinv";
  const DeviceGuard guard(a);
  NewtonPinvCall call = newton_pinv_call(kOp, a, iterations, ridge, step);
  Tensor out = newton_pinv_output(call.p, a);
  if (call.empty) return out;
  Tensor workspace = workspace_of(a, newton_pinv_fwd_workspace_bytes(call.p));
  check_launch(
      kOp, launch_newton_pinv_fwd(call.p, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_stream(a))));
  return out;
}

Tensor newton_pinv_backward(Tensor grad_out, Tensor out) {
  constexpr const char* kOp = "newton_pinv_backward";
  const DeviceGuard guard(out);
  NewtonPinvCall call = newton_pinv_backward_call(kOp, grad_out, out);
  Tensor da = newton_pinv_gradient(call.p, out);
  if (call.empty) return da;
  Tensor workspace = workspace_of(out, newton_pinv_bwd_workspace_bytes(call.p));
  check_launch(kOp, launch_newton_pinv_bwd(call.p, workspace.mutable_data_ptr(),
                                           static_cast<cudaStream_t>(current_stream(out))));
  return da;
}

}  // namespace
}  // namespace effvit

EFFVIT_IMPL(newton_pinv, effvit::newton_pinv)
EFFVIT_IMPL(newton_pinv_backward, effvit::newton_pinv_backward)
