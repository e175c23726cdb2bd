// linear_attention on the CPU: binding. The kernel is in linear_attention_kernel.inl.h.
#include "linear_attention.h"

#include "../common/linear_attention_binding.h"

namespace effvit {
namespace {

void run(const LinearAttentionParams& p, bool backward, const Tensor& like) {
  const cpu::LinearAttentionKernel kernel = cpu::linear_attention_kernel();
  const int64_t floats = kernel.workspace(p, backward);
  OptionalTensor workspace;
  float* data = nullptr;
  if (floats > 0) {
    workspace = empty(like, {floats}, ScalarType::Float);
    data = static_cast<float*>(workspace->mutable_data_ptr());
  }
  for (int phase = 0; phase < kernel.phases(backward); ++phase) {
    parallel_for(kernel.units(p, backward, phase), 1,
                 [&](int64_t begin, int64_t end) { kernel.run(p, backward, phase, data, begin, end); });
  }
}

std::tuple<Tensor, Tensor, Tensor> linear_attention(Tensor q, Tensor k, Tensor v, OptionalTensor q_den,
                                                    OptionalTensor k_den, OptionalTensor weight,
                                                    OptionalTensor cu_seqlens, OptionalTensor initial_state,
                                                    OptionalTensor initial_z, int64_t feature_map, int64_t normalize,
                                                    double eps, double clamp_min, double scale, bool causal,
                                                    bool quadratic) {
  constexpr const char* kOp = "linear_attention";
  LinearAttentionCall call =
      linear_attention_call(kOp, q, k, v, q_den, k_den, weight, cu_seqlens, initial_state, initial_z, feature_map,
                            normalize, eps, clamp_min, scale, causal, quadratic);
  linear_attention_check_offsets(kOp, call.p);
  auto outputs = linear_attention_outputs(call.p, q);
  if (!call.empty) run(call.p, false, q);
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
  LinearAttentionCall call =
      linear_attention_call(kOp, q, k, v, q_den, k_den, weight, cu_seqlens, initial_state, initial_z, feature_map,
                            normalize, eps, clamp_min, scale, causal, quadratic);
  linear_attention_check_offsets(kOp, call.p);
  auto grads = linear_attention_backward_call(kOp, call, q, grad_out, grad_state, grad_z, state, z);
  if (!call.empty) run(call.p, true, q);
  return grads;
}

}  // namespace
}  // namespace effvit

EFFVIT_IMPL(linear_attention, effvit::linear_attention)
EFFVIT_IMPL(linear_attention_backward, effvit::linear_attention_backward)
