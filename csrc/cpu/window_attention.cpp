// window_attention on the CPU: binding. The kernel is in window_attention_kernel.inl.h.
#include "../common/window_attention_binding.h"
#include "window_attention.h"

namespace effvit {
namespace {

std::tuple<Tensor, Tensor> window_attention(Tensor q, Tensor k, Tensor v, OptionalTensor bias_table,
                                            OptionalTensor logit_scale, OptionalTensor pad_k, OptionalTensor pad_v,
                                            std::vector<int64_t> window, std::vector<int64_t> shift,
                                            std::vector<int64_t> dilation, std::vector<int64_t> halo,
                                            std::optional<double> scale, double mask_value, bool roll_before_pad) {
  WindowAttentionCall call = window_attention_call("window_attention", q, k, v, bias_table, logit_scale, pad_k, pad_v,
                                                   window, shift, dilation, halo, scale, mask_value, roll_before_pad);
  auto outputs = window_attention_outputs(call.p, q);
  if (call.empty) return outputs;
  const cpu::WindowAttentionKernel kernel = cpu::window_attention_kernel();
  parallel_for(kernel.forward_units(call.p), 1,
               [&](int64_t begin, int64_t end) { kernel.forward(call.p, begin, end); });
  return outputs;
}

WindowAttentionGrads window_attention_backward(Tensor grad_out, OptionalTensor grad_lse, Tensor q, Tensor k, Tensor v,
                                               Tensor out, Tensor lse, OptionalTensor bias_table,
                                               OptionalTensor logit_scale, OptionalTensor pad_k, OptionalTensor pad_v,
                                               std::vector<int64_t> window, std::vector<int64_t> shift,
                                               std::vector<int64_t> dilation, std::vector<int64_t> halo,
                                               std::optional<double> scale, double mask_value, bool roll_before_pad) {
  constexpr const char* kOp = "window_attention_backward";
  WindowAttentionCall call = window_attention_call(kOp, q, k, v, bias_table, logit_scale, pad_k, pad_v, window, shift,
                                                   dilation, halo, scale, mask_value, roll_before_pad);
  auto grads = window_attention_backward_call(kOp, call, q, grad_out, grad_lse, out, lse, bias_table, logit_scale);
  if (call.empty) return grads;
  const cpu::WindowAttentionKernel kernel = cpu::window_attention_kernel();
  Tensor partials = empty(q, {kernel.backward_partials(call.p)}, ScalarType::Float);
  float* const sums = static_cast<float*>(partials.mutable_data_ptr());
  parallel_for(kernel.backward_units(call.p), 1,
               [&](int64_t begin, int64_t end) { kernel.backward(call.p, sums, begin, end); });
  kernel.backward_reduce(call.p, sums);
  return grads;
}

}  // namespace
}  // namespace effvit

EFFVIT_IMPL(window_attention, effvit::window_attention)
EFFVIT_IMPL(window_attention_backward, effvit::window_attention_backward)
