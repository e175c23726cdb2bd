// rbf_gram on a GPU, and in the emulator: binding. The kernels are in rbf_gram.cuh.
#include "rbf_gram.cuh"

#include "../common/rbf_gram_binding.h"
#include "binding.h"

namespace effvit {
namespace {

Tensor rbf_gram(Tensor q, Tensor k, double gamma) {
  constexpr const char* kOp = "rbf_gram";
  const DeviceGuard guard(q);
  RbfGramCall call = rbf_gram_call(kOp, q, k, gamma);
  Tensor out = rbf_gram_output(call.p, q);
  if (call.empty) return out;
  check_launch(kOp, launch_rbf_gram_fwd(call.p, static_cast<cudaStream_t>(current_stream(q))));
  return out;
}

std::tuple<Tensor, Tensor> rbf_gram_backward(Tensor grad_out, Tensor q, Tensor k, Tensor out, double gamma) {
  constexpr const char* kOp = "rbf_gram_backward";
  const DeviceGuard guard(q);
  RbfGramCall call = rbf_gram_call(kOp, q, k, gamma);
  auto grads = rbf_gram_backward_call(kOp, call, grad_out, q, k, out);
  if (call.empty) return grads;
  const auto floats = static_cast<int64_t>(rbf_gram_bwd_workspace_bytes(call.p) / sizeof(float));
  Tensor workspace = empty(q, {floats}, ScalarType::Float);
  check_launch(kOp,
               launch_rbf_gram_bwd(call.p, workspace.mutable_data_ptr(), static_cast<cudaStream_t>(current_stream(q))));
  return grads;
}

}  // namespace
}  // namespace effvit

EFFVIT_IMPL(rbf_gram, effvit::rbf_gram)
EFFVIT_IMPL(rbf_gram_backward, effvit::rbf_gram_backward)
