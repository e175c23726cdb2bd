// window_attention on a GPU, and in the emulator: binding. The kernels are in window_attention.cuh.
#include "window_attention.cuh"

#include "../common/window_attention_binding.h"
#include "binding.h"

namespace effvit {
namespace {

std::tuple<Tensor, Tensor> window_attention(Tensor q, Tensor k, Tensor v, OptionalTensor bias_table,
                                            OptionalTensor logit_scale, OptionalTensor pad_k, OptionalTensor pad_v,
                                            std::vector<int64_t> window, std::vector<int64_t> shift,
                                            std::vector<int64_t> dilation, std::vector<int64_t> halo,
                                            std::optional<double> scale, double mask_value, bool roll_before_pad) {
  constexpr const char* kOp = "window_attention";
  const DeviceGuard guard(q);
  WindowAttentionCall call = window_attention_call(kOp, q, k, v, bias_table, logit_scale, pad_k, pad_v, window, shift,
                                                   dilation, halo, scale, mask_value, roll_before_pad);
  auto outputs = window_attention_outputs(call.p, q);
  if (call.empty) return outputs;
  check_launch(kOp, launch_window_attention_fwd(call.p, static_cast<cudaStream_t>(current_stream(q))));
  return outputs;
}

WindowAttentionGrads window_attention_backward(Tensor grad_out, OptionalTensor grad_lse, Tensor q, Tensor k, Tensor v,
                                               Tensor out, Tensor lse, OptionalTensor bias_table,
                                               OptionalTensor logit_scale, OptionalTensor pad_k, OptionalTensor pad_v,
                                               std::vector<int64_t> window, std::vector<int64_t> shift,
                                               std::vector<int64_t> dilation, std::vector<int64_t> halo,
                                               std::optional<double> scale, double mask_value, bool roll_before_pad) {
  constexpr const char* kOp = "window_attention_backward";
  const DeviceGuard guard(q);
  WindowAttentionCall call = window_attention_call(kOp, q, k, v, bias_table, logit_scale, pad_k, pad_v, window, shift,
                                                   dilation, halo, scale, mask_value, roll_before_pad);
  auto grads = window_attention_backward_call(kOp, call, q, grad_out, grad_lse, out, lse, bias_table, logit_scale);
  if (call.empty) return grads;
  const auto floats = static_cast<int64_t>(window_attention_bwd_workspace_bytes(call.p) / sizeof(float));
  Tensor workspace = empty(q, {floats}, ScalarType::Float);
  check_launch(kOp, launch_window_attention_bwd(call.p, workspace.mutable_data_ptr(),
                                                static_cast<cudaStream_t>(current_stream(q))));
  return grads;
}

}  // namespace
}  // namespace effvit

EFFVIT_IMPL(window_attention, effvit::window_attention)
EFFVIT_IMPL(window_attention_backward, effvit::window_attention_backward)
