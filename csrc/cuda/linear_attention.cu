// linear_attention on a GPU, and in the emulator: binding. The kernels are in linear_attention.cuh.
#include "linear_attention.cuh"

#include "../common/linear_attention_binding.h"
#include "binding.h"

namespace effvit {
namespace {

Tensor workspace_of(const Tensor& q, size_t bytes) {
  return empty(q, {static_cast<int64_t>(bytes / sizeof(float))}, ScalarType::Float);
}

// The offsets' values would have to be waited for on a GPU: there the kernels cut them.
void check_offsets(const char* op, const LinearAttentionParams& p) {
#if defined(EFFVIT_EMU)
  linear_attention_check_offsets(op, p);
#else
  (void)op, (void)p;
#endif
}

std::tuple<Tensor, Tensor, Tensor> linear_attention(Tensor q, Tensor k, Tensor v, OptionalTensor q_den,
                                                    OptionalTensor k_den, OptionalTensor weight,
                                                    OptionalTensor cu_seqlens, OptionalTensor initial_state,
                                                    OptionalTensor initial_z, int64_t feature_map, int64_t normalize,
                                                    double eps, double clamp_min, double scale, bool causal,
                                                    bool quadratic) {
  constexpr const char* kOp = "linear_attention";
  const DeviceGuard guard(q);
  LinearAttentionCall call =
      linear_attention_call(kOp, q, k, v, q_den, k_den, weight, cu_seqlens, initial_state, initial_z, feature_map,
                            normalize, eps, clamp_min, scale, causal, quadratic);
  check_offsets(kOp, call.p);
  auto outputs = linear_attention_outputs(call.p, q);
  if (call.empty) return outputs;
  Tensor workspace = workspace_of(q, linear_attention_fwd_workspace_bytes(call.p));
  check_launch(kOp, launch_linear_attention_fwd(call.p, workspace.mutable_data_ptr(),
                                                static_cast<cudaStream_t>(current_stream(q))));
  return outputs;
}

LinearAttentionGrads linear_attention_backward(Tensor grad_out, OptionalTensor grad_state, OptionalTensor grad_z,
                                               Tensor q, Tensor k, Tensor v, Tensor state, Tensor z,
                                               OptionalTensor q_den, OptionalTensor k_den, OptionalTensor weight,
                                               OptionalTensor cu_seqlens, OptionalTensor initial_state,
                                               OptionalTensor initial_z, int64_t feature_map, int64_t normalize,
                                               double eps, double clamp_min, double scale, bool causal,
                                               bool quadratic) {
  constexpr const char* kOp = "linear_attention_backward";
  const DeviceGuard guard(q);
  LinearAttentionCall call =
      linear_attention_call(kOp, q, k, v, q_den, k_den, weight, cu_seqlens, initial_state, initial_z, feature_map,
                            normalize, eps, clamp_min, scale, causal, quadratic);
  check_offsets(kOp, call.p);
  auto grads = linear_attention_backward_call(kOp, call, q, grad_out, grad_state, grad_z, state, z);
  if (call.empty) return grads;
  Tensor workspace = workspace_of(q, linear_attention_bwd_workspace_bytes(call.p));
  check_launch(kOp, launch_linear_attention_bwd(call.p, workspace.mutable_data_ptr(),
                                                static_cast<cudaStream_t>(current_stream(q))));
  return grads;
}

}  // namespace
}  // namespace effvit

EFFVIT_IMPL(linear_attention, effvit::linear_attention)
EFFVIT_IMPL(linear_attention_backward, effvit::linear_attention_backward)
