// rbf_gram on the CPU: binding. The kernel is in rbf_gram_kernel.inl.h.
#include "rbf_gram.h"

#include "../common/rbf_gram_binding.h"

namespace effvit {
namespace {

Tensor rbf_gram(Tensor q, Tensor k, double gamma) {
  RbfGramCall call = rbf_gram_call("rbf_gram", q, k, gamma);
  Tensor out = rbf_gram_output(call.p, q);
  if (call.empty) return out;
  const cpu::RbfGramKernel kernel = cpu::rbf_gram_kernel();
  parallel_for(kernel.forward_units(call.p), 1,
               [&](int64_t begin, int64_t end) { kernel.forward(call.p, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> rbf_gram_backward(Tensor grad_out, Tensor q, Tensor k, Tensor out, double gamma) {
  constexpr const char* kOp = "rbf_gram_backward";
  RbfGramCall call = rbf_gram_call(kOp, q, k, gamma);
  auto grads = rbf_gram_backward_call(kOp, call, grad_out, q, k, out);
  if (call.empty) return grads;
  const cpu::RbfGramKernel kernel = cpu::rbf_gram_kernel();
  Tensor partials = empty(q, {kernel.backward_partials(call.p)}, ScalarType::Float);
  float* const sums = static_cast<float*>(partials.mutable_data_ptr());
  parallel_for(kernel.backward_units(call.p), 1,
               [&](int64_t begin, int64_t end) { kernel.backward(call.p, sums, begin, end); });
  kernel.backward_reduce(call.p, sums);
  return grads;
}

}  // namespace
}  // namespace effvit

EFFVIT_IMPL(rbf_gram, effvit::rbf_gram)
EFFVIT_IMPL(rbf_gram_backward, effvit::rbf_gram_backward)
