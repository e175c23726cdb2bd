// newton_pinv on the CPU: binding. The kernel is in newton_pinv_kernel.inl.h.
#include "newton_pinv.h"

#include "../common/newton_pinv_binding.h"

namespace effvit {
namespace {

Tensor newton_pinv(Tensor a, int64_t iterations, double ridge, double step) {
  NewtonPinvCall call = newton_pinv_call("newton_pinv", a, iterations, ridge, step);
  Tensor out = newton_pinv_output(call.p, a);
  if (call.empty) return out;
  const cpu::NewtonPinvKernel kernel = cpu::newton_pinv_kernel();
  parallel_for(call.p.B * call.p.H, 1, [&](int64_t begin, int64_t end) { kernel.forward(call.p, begin, end); });
  return out;
}

Tensor newton_pinv_backward(Tensor grad_out, Tensor out) {
  NewtonPinvCall call = newton_pinv_backward_call("newton_pinv_backward", grad_out, out);
  Tensor da = newton_pinv_gradient(call.p, out);
  if (call.empty) return da;
  const cpu::NewtonPinvKernel kernel = cpu::newton_pinv_kernel();
  parallel_for(call.p.B * call.p.H, 1, [&](int64_t begin, int64_t end) { kernel.backward(call.p, begin, end); });
  return da;
}

}  // namespace
}  // namespace effvit

EFFVIT_IMPL(newton_pinv, effvit::newton_pinv)
EFFVIT_IMPL(newton_pinv_backward, effvit::newton_pinv_backward)
