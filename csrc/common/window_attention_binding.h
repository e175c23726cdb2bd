// Checks and allocation of window_attention, shared by the CPU and the CUDA binding. No kernel code.
#pragma once

#include <algorithm>

#include "stable.h"
#include "window_attention_params.h"

namespace effvit {
namespace window_attention_detail {

inline std::pair<int32_t, int32_t> check_pair(const char* op, const char* name, const std::vector<int64_t>& v,
                                              int64_t low) {
  check(v.size() == 2, op, name, " must be 2 integers, got ", v);
  constexpr int64_t kMax = 1 << 15;
  check(v[0] >= low && v[1] >= low && v[0] <= kMax && v[1] <= kMax, op, name, " must be between ", low, " and ", kMax,
        ", got ", v);
  return {static_cast<int32_t>(v[0]), static_cast<int32_t>(v[1])};
}

}  // namespace window_attention_detail

// Holds what the parameter struct points to.
struct WindowAttentionCall {
  WindowAttentionParams p;
  OptionalTensor logit_scale, pad_k, pad_v;  // contiguous copies where the caller's were not
  bool empty = false;  // nothing to compute
};

inline WindowAttentionCall window_attention_call(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const OptionalTensor& bias_table, const OptionalTensor& logit_scale,
                                                 const OptionalTensor& pad_k, const OptionalTensor& pad_v,
                                                 const std::vector<int64_t>& window, const std::vector<int64_t>& shift,
                                                 const std::vector<int64_t>& dilation, const std::vector<int64_t>& halo,
                                                 std::optional<double> scale, double mask_value, bool roll_before_pad) {
  using namespace window_attention_detail;
  WindowAttentionCall call;
  WindowAttentionParams& p = call.p;

  check(q.dim() == 5, op, "q must be [B, H, W, h, d], got ", shape_of(q));
  check_float_dtype(op, "q", q);
  check(k.dim() == 5 && shape_of(k) == shape_of(q), op, "k must be [B, H, W, h, d] like q ", shape_of(q), ", got ",
        shape_of(k));
  check(v.dim() == 5 && std::equal(v.sizes().begin(), v.sizes().begin() + 4, q.sizes().begin()), op,
        "v must be [B, H, W, h, dv] like q ", shape_of(q), ", got ", shape_of(v));
  for (auto [name, t] : {std::pair<const char*, const Tensor*>{"q", &q}, {"k", &k}, {"v", &v}}) {
    check_dtype(op, name, *t, q.scalar_type(), "q");
    check_device(op, name, *t, q);
    check_last_stride(op, name, *t);
  }
  p.B = q.size(0), p.H = q.size(1), p.W = q.size(2), p.h = q.size(3), p.d = q.size(4), p.dv = v.size(4);
  check(p.d >= 1, op, "q must have a head dim of at least 1, got ", shape_of(q));
  check(p.dv >= 1, op, "v must have a head dim of at least 1, got ", shape_of(v));
  constexpr int64_t kMaxSide = int64_t{1} << 24;  // positions on one axis stay far below int32
  check(p.H <= kMaxSide && p.W <= kMaxSide, op, "q must have H and W of at most ", kMaxSide, ", got ", shape_of(q));

  std::tie(p.window_h, p.window_w) = check_pair(op, "window", window, 1);
  std::tie(p.shift_h, p.shift_w) = check_pair(op, "shift", shift, 0);
  std::tie(p.dilation_h, p.dilation_w) = check_pair(op, "dilation", dilation, 1);
  std::tie(p.halo_h, p.halo_w) = check_pair(op, "halo", halo, 0);
  check(p.shift_h < p.window_h && p.shift_w < p.window_w, op, "shift must be in [0, window) for window ", window,
        ", got ", shift);
  constexpr int64_t kMaxExtent = int64_t{1} << 24;
  check((p.window_h + 2 * int64_t{p.halo_h}) * p.dilation_h <= kMaxExtent &&
            (p.window_w + 2 * int64_t{p.halo_w}) * p.dilation_w <= kMaxExtent,
        op, "dilation must be such that (window + 2*halo) * dilation is at most ", kMaxExtent, ", got ", dilation);
  check(!(scale && logit_scale), op, "scale must be None when logit_scale is given, got ", scale.value_or(0.));
  p.scale = check_finite(op, "scale", scale ? *scale : 1.0 / std::sqrt(static_cast<double>(p.d)));
  p.mask_value = check_finite(op, "mask_value", mask_value);
  p.roll_before_pad = roll_before_pad;
  p.dtype = to_dtype(q.scalar_type());

  if (bias_table) {
    check_float_dtype(op, "bias_table", *bias_table);
    check_device(op, "bias_table", *bias_table, q);
    check_shape(op, "bias_table", *bias_table, "[h, 2*wh-1+2*halo_h, 2*ww-1+2*halo_w]",
                {p.h, 2 * int64_t{p.window_h} - 1 + 2 * p.halo_h, 2 * int64_t{p.window_w} - 1 + 2 * p.halo_w});
    p.bias_table = bias_table->const_data_ptr();
    p.bias_dtype = to_dtype(bias_table->scalar_type());
    p.bias_stride_h = bias_table->stride(0);
    p.bias_stride_y = bias_table->stride(1);
    p.bias_stride_x = bias_table->stride(2);
  }
  if (logit_scale) {
    check_float_dtype(op, "logit_scale", *logit_scale);
    check_device(op, "logit_scale", *logit_scale, q);
    check_shape(op, "logit_scale", *logit_scale, "[h]", {p.h});
    p.logit_scale_dtype = to_dtype(logit_scale->scalar_type());
  }
  check(pad_k.has_value() == pad_v.has_value(), op, pad_k ? "pad_v" : "pad_k", " must be given together with ",
        pad_k ? "pad_k" : "pad_v", ", got None");
  if (pad_k) {
    for (auto [name, t] : {std::pair<const char*, const Tensor*>{"pad_k", &*pad_k}, {"pad_v", &*pad_v}}) {
      check_dtype(op, name, *t, q.scalar_type(), "q");
      check_device(op, name, *t, q);
    }
    check_shape(op, "pad_k", *pad_k, "[h, d]", {p.h, p.d});
    check_shape(op, "pad_v", *pad_v, "[h, dv]", {p.h, p.dv});
  }
  call.logit_scale = contiguous_or_null(logit_scale);
  call.pad_k = contiguous_or_null(pad_k);
  call.pad_v = contiguous_or_null(pad_v);
  p.logit_scale = data_or_null(call.logit_scale);
  p.pad_k = data_or_null(call.pad_k);
  p.pad_v = data_or_null(call.pad_v);

  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.q_stride_b = q.stride(0), p.q_stride_y = q.stride(1), p.q_stride_x = q.stride(2), p.q_stride_h = q.stride(3);
  p.k_stride_b = k.stride(0), p.k_stride_y = k.stride(1), p.k_stride_x = k.stride(2), p.k_stride_h = k.stride(3);
  p.v_stride_b = v.stride(0), p.v_stride_y = v.stride(1), p.v_stride_x = v.stride(2), p.v_stride_h = v.stride(3);
  call.empty = p.B * p.H * p.W * p.h == 0;
  return call;
}

// Allocates out and lse and points the parameters to them.
inline std::tuple<Tensor, Tensor> window_attention_outputs(WindowAttentionParams& p, const Tensor& q) {
  Tensor out = empty(q, {p.B, p.H, p.W, p.h, p.dv}, q.scalar_type());
  Tensor lse = empty(q, {p.B, p.h, p.H, p.W}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  return {out, lse};
}

// dqkv, dbias_table, dlogit_scale, dpad_k, dpad_v
using WindowAttentionGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Checks the backward's own arguments, allocates the gradients and points the parameters to them. When there is nothing
// to compute the gradients are zeros.
inline WindowAttentionGrads window_attention_backward_call(const char* op, WindowAttentionCall& call, const Tensor& q,
                                                           const Tensor& grad_out, OptionalTensor& grad_lse,
                                                           const Tensor& out, const Tensor& lse,
                                                           const OptionalTensor& bias_table,
                                                           const OptionalTensor& logit_scale) {
  WindowAttentionParams& p = call.p;
  const std::vector<int64_t> out_shape{p.B, p.H, p.W, p.h, p.dv}, lse_shape{p.B, p.h, p.H, p.W};
  check_shape(op, "grad_out", grad_out, "[B, H, W, h, dv]", out_shape);
  check_dtype(op, "grad_out", grad_out, q.scalar_type(), "q");
  check_device(op, "grad_out", grad_out, q);
  check_last_stride(op, "grad_out", grad_out);
  check_shape(op, "out", out, "[B, H, W, h, dv]", out_shape);
  check_dtype(op, "out", out, q.scalar_type(), "q");
  check_device(op, "out", out, q);
  check(out.is_contiguous(), op, "out must be contiguous as the forward returned it, got another layout");
  check_shape(op, "lse", lse, "[B, h, H, W]", lse_shape);
  check_dtype(op, "lse", lse, ScalarType::Float, "the forward's");
  check_device(op, "lse", lse, q);
  check(lse.is_contiguous(), op, "lse must be contiguous as the forward returned it, got another layout");
  if (grad_lse) {
    check_shape(op, "grad_lse", *grad_lse, "[B, h, H, W]", lse_shape);
    check_dtype(op, "grad_lse", *grad_lse, ScalarType::Float, "lse");
    check_device(op, "grad_lse", *grad_lse, q);
    grad_lse = contiguous_or_null(grad_lse);
    p.grad_lse = static_cast<const float*>(grad_lse->const_data_ptr());
  }
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_stride_b = grad_out.stride(0), p.grad_out_stride_y = grad_out.stride(1);
  p.grad_out_stride_x = grad_out.stride(2), p.grad_out_stride_h = grad_out.stride(3);
  p.out = const_cast<void*>(out.const_data_ptr());
  p.lse = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));

  const ScalarType dtype = q.scalar_type();
  const std::vector<int64_t> none{0};
  Tensor dqkv = empty(q, {p.B, p.H, p.W, p.h * (2 * p.d + p.dv)}, dtype);
  Tensor dbias =
      bias_table ? empty(q, shape_of(*bias_table), bias_table->scalar_type()) : empty(q, none, ScalarType::Float);
  Tensor dlogit = logit_scale ? empty(q, {p.h}, logit_scale->scalar_type()) : empty(q, none, ScalarType::Float);
  Tensor dpad_k = empty(q, p.pad_k ? std::vector<int64_t>{p.h, p.d} : none, dtype);
  Tensor dpad_v = empty(q, p.pad_v ? std::vector<int64_t>{p.h, p.dv} : none, dtype);
  if (call.empty) {
    for (Tensor* t : {&dqkv, &dbias, &dlogit, &dpad_k, &dpad_v}) torch::stable::zero_(*t);
  }
  p.dqkv = dqkv.mutable_data_ptr();
  p.dq = p.dqkv;
  p.dk = static_cast<char*>(p.dqkv) + p.h * p.d * element_bytes(p.dtype);
  p.dvalue = static_cast<char*>(p.dqkv) + 2 * p.h * p.d * element_bytes(p.dtype);
  p.dq_stride_t = p.dk_stride_t = p.dvalue_stride_t = p.h * (2 * p.d + p.dv);
  p.dbias_table = dbias.mutable_data_ptr();
  p.dlogit_scale = dlogit.mutable_data_ptr();
  p.dpad_k = dpad_k.mutable_data_ptr();
  p.dpad_v = dpad_v.mutable_data_ptr();
  return {dqkv, dbias, dlogit, dpad_k, dpad_v};
}

}  // namespace effvit
