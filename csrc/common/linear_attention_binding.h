// Checks and allocation of linear_attention, shared by the CPU and the CUDA binding. No kernel code.
#pragma once

#include "linear_attention_params.h"
#include "stable.h"

namespace effvit {

// Holds what the parameter struct points to.
struct LinearAttentionCall {
  LinearAttentionParams p;
  OptionalTensor cu_seqlens, initial_state, initial_z, grad_state, grad_z;  // contiguous copies where needed
  // Given, although perhaps with no elements: such a tensor has a null pointer.
  bool has_q_den = false, has_k_den = false, has_weight = false, has_initial = false;
  bool empty = false;  // no sequence or no head: every result is an empty tensor
};

namespace linear_attention_detail {

constexpr int64_t kMaxDim = 256;

inline void check_token_tensor(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  check_dtype(op, name, t, q.scalar_type(), "q");
  check_device(op, name, t, q);
  check_last_stride(op, name, t);
}

inline void check_float32(const char* op, const char* name, const Tensor& t, const Tensor& q, const char* dims,
                          const std::vector<int64_t>& expected) {
  check(t.scalar_type() == ScalarType::Float, op, name, " must be torch.float32, got ", dtype_name(t.scalar_type()));
  check_device(op, name, t, q);
  check_shape(op, name, t, dims, expected);
}

}  // namespace linear_attention_detail

inline LinearAttentionCall linear_attention_call(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const OptionalTensor& q_den, const OptionalTensor& k_den,
                                                 const OptionalTensor& weight, const OptionalTensor& cu_seqlens,
                                                 const OptionalTensor& initial_state, const OptionalTensor& initial_z,
                                                 int64_t feature_map, int64_t normalize, double eps, double clamp_min,
                                                 double scale, bool causal, bool quadratic) {
  using namespace linear_attention_detail;
  LinearAttentionCall call;
  LinearAttentionParams& p = call.p;

  check(q.dim() == 4, op, "q must be [B, L, H, K], got ", shape_of(q));
  check_float_dtype(op, "q", q);
  check(k.dim() == 4 && k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3), op,
        "k must be [B, M, H, K] like q ", shape_of(q), ", got ", shape_of(k));
  check(v.dim() == 4 && v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2), op,
        "v must be [B, M, H, V] like k ", shape_of(k), ", got ", shape_of(v));
  p.B = q.size(0), p.L = q.size(1), p.H = q.size(2), p.K = q.size(3);
  p.M = k.size(1), p.V = v.size(3);
  check(p.K >= 1 && p.K <= kMaxDim, op, "q must have a head dim between 1 and ", kMaxDim, ", got ", shape_of(q));
  check(p.V >= 1 && p.V <= kMaxDim, op, "v must have a head dim between 1 and ", kMaxDim, ", got ", shape_of(v));
  check_token_tensor(op, "q", q, q);
  check_token_tensor(op, "k", k, q);
  check_token_tensor(op, "v", v, q);

  check(feature_map >= 0 && feature_map <= 3, op, "feature_map must be between 0 and 3, got ", feature_map);
  check(normalize >= 0 && normalize <= 3, op, "normalize must be between 0 and 3, got ", normalize);
  p.feature_map = static_cast<FeatureMap>(feature_map);
  p.normalize = static_cast<Normalize>(normalize);
  p.eps = check_finite(op, "eps", eps);
  p.clamp_min = check_finite(op, "clamp_min", clamp_min);
  p.scale = check_finite(op, "scale", scale);
  p.causal = causal, p.quadratic = quadratic;
  p.dtype = to_dtype(q.scalar_type());
  check(!causal || p.L == p.M, op, "k must be as long as q when causal is True, ", p.L, ", got ", p.M);

  if (q_den) {
    check(p.normalize != Normalize::kNone, op, "q_den must be None when normalize is none, got ", shape_of(*q_den));
    check_shape(op, "q_den", *q_den, "[B, L, H, K]", shape_of(q));
    check_token_tensor(op, "q_den", *q_den, q);
    p.q_den = q_den->const_data_ptr();
    p.q_den_stride_b = q_den->stride(0), p.q_den_stride_l = q_den->stride(1), p.q_den_stride_h = q_den->stride(2);
  }
  if (k_den) {
    check(p.normalize != Normalize::kNone, op, "k_den must be None when normalize is none, got ", shape_of(*k_den));
    check_shape(op, "k_den", *k_den, "[B, M, H, K]", shape_of(k));
    check_token_tensor(op, "k_den", *k_den, q);
    p.k_den = k_den->const_data_ptr();
    p.k_den_stride_b = k_den->stride(0), p.k_den_stride_l = k_den->stride(1), p.k_den_stride_h = k_den->stride(2);
  }
  if (weight) {
    check_float_dtype(op, "weight", *weight);
    check_device(op, "weight", *weight, q);
    check_shape(op, "weight", *weight, "[B, M, H]", {p.B, p.M, p.H});
    p.weight = weight->const_data_ptr();
    p.weight_dtype = to_dtype(weight->scalar_type());
    p.weight_stride_b = weight->stride(0), p.weight_stride_l = weight->stride(1), p.weight_stride_h = weight->stride(2);
  }
  p.N = p.B;
  if (cu_seqlens) {
    check(!quadratic, op, "cu_seqlens must be None when quadratic is True, got ", shape_of(*cu_seqlens));
    check(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, op, "cu_seqlens must be [N + 1], got ",
          shape_of(*cu_seqlens));
    check(cu_seqlens->scalar_type() == ScalarType::Int, op, "cu_seqlens must be torch.int32, got ",
          dtype_name(cu_seqlens->scalar_type()));
    check_device(op, "cu_seqlens", *cu_seqlens, q);
    check(p.B == 1, op, "q must have a batch size of 1 when cu_seqlens is given, got ", shape_of(q));
    check(p.L == p.M, op, "k must be as long as q when cu_seqlens is given, ", p.L, ", got ", p.M);
    p.N = cu_seqlens->size(0) - 1;
    call.cu_seqlens = contiguous_or_null(cu_seqlens);
    p.cu_seqlens = static_cast<const int32_t*>(call.cu_seqlens->const_data_ptr());
  }
  check(initial_state.has_value() == initial_z.has_value(), op, initial_state ? "initial_z" : "initial_state",
        " must be given together with ", initial_state ? "initial_state" : "initial_z", ", got None");
  if (initial_state) {
    check(!quadratic, op, "initial_state must be None when quadratic is True, got ", shape_of(*initial_state));
    check_float32(op, "initial_state", *initial_state, q, "[N, H, K, V]", {p.N, p.H, p.K, p.V});
    check_float32(op, "initial_z", *initial_z, q, "[N, H, K]", {p.N, p.H, p.K});
    call.initial_state = contiguous_or_null(initial_state);
    call.initial_z = contiguous_or_null(initial_z);
    p.initial_state = static_cast<const float*>(call.initial_state->const_data_ptr());
    p.initial_z = static_cast<const float*>(call.initial_z->const_data_ptr());
  }

  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.q_stride_b = q.stride(0), p.q_stride_l = q.stride(1), p.q_stride_h = q.stride(2);
  p.k_stride_b = k.stride(0), p.k_stride_l = k.stride(1), p.k_stride_h = k.stride(2);
  p.v_stride_b = v.stride(0), p.v_stride_l = v.stride(1), p.v_stride_h = v.stride(2);
  call.has_q_den = q_den.has_value(), call.has_k_den = k_den.has_value();
  call.has_weight = weight.has_value(), call.has_initial = initial_state.has_value();
  call.empty = p.B * p.H == 0;
  return call;
}

// The offsets' values, where they can be read without waiting for a device.
inline void linear_attention_check_offsets(const char* op, const LinearAttentionParams& p) {
  if (p.cu_seqlens == nullptr) return;
  bool ok = p.cu_seqlens[0] == 0 && p.cu_seqlens[p.N] == p.L;
  for (int64_t n = 0; n < p.N; ++n) ok = ok && p.cu_seqlens[n] <= p.cu_seqlens[n + 1];
  check(ok, op, "cu_seqlens must rise from 0 to the length of q, ", p.L, ", got ",
        std::vector<int64_t>(p.cu_seqlens, p.cu_seqlens + p.N + 1));
}

// Allocates out, state and z and points the parameters to them.
inline std::tuple<Tensor, Tensor, Tensor> linear_attention_outputs(LinearAttentionParams& p, const Tensor& q) {
  const int64_t K = p.quadratic ? 0 : p.K, V = p.quadratic ? 0 : p.V;
  Tensor out = empty(q, {p.B, p.L, p.H, p.V}, q.scalar_type());
  Tensor state = empty(q, {p.N, p.H, K, V}, ScalarType::Float);
  Tensor z = empty(q, {p.N, p.H, K}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  if (!p.quadratic) {
    p.state = static_cast<float*>(state.mutable_data_ptr());
    p.z = static_cast<float*>(z.mutable_data_ptr());
  }
  return {out, state, z};
}

// dq, dk, dv, dq_den, dk_den, dweight, dinitial_state, dinitial_z
using LinearAttentionGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Checks the backward's own arguments, allocates the gradients and points the parameters to them.
inline LinearAttentionGrads linear_attention_backward_call(const char* op, LinearAttentionCall& call, const Tensor& q,
                                                           const Tensor& grad_out, const OptionalTensor& grad_state,
                                                           const OptionalTensor& grad_z, const Tensor& state,
                                                           const Tensor& z) {
  using namespace linear_attention_detail;
  LinearAttentionParams& p = call.p;
  const int64_t K = p.quadratic ? 0 : p.K, V = p.quadratic ? 0 : p.V;
  const std::vector<int64_t> state_shape{p.N, p.H, K, V}, z_shape{p.N, p.H, K};
  check_shape(op, "grad_out", grad_out, "[B, L, H, V]", {p.B, p.L, p.H, p.V});
  check_token_tensor(op, "grad_out", grad_out, q);
  check_float32(op, "state", state, q, "[N, H, K, V]", state_shape);
  check(state.is_contiguous(), op, "state must be contiguous as the forward returned it, got another layout");
  check_float32(op, "z", z, q, "[N, H, K]", z_shape);
  check(z.is_contiguous(), op, "z must be contiguous as the forward returned it, got another layout");
  if (grad_state) check_float32(op, "grad_state", *grad_state, q, "[N, H, K, V]", state_shape);
  if (grad_z) check_float32(op, "grad_z", *grad_z, q, "[N, H, K]", z_shape);
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_stride_b = grad_out.stride(0), p.grad_out_stride_l = grad_out.stride(1);
  p.grad_out_stride_h = grad_out.stride(2);
  if (!p.quadratic) {
    p.state = const_cast<float*>(static_cast<const float*>(state.const_data_ptr()));
    p.z = const_cast<float*>(static_cast<const float*>(z.const_data_ptr()));
    call.grad_state = contiguous_or_null(grad_state);
    call.grad_z = contiguous_or_null(grad_z);
    p.grad_state = static_cast<const float*>(data_or_null(call.grad_state));
    p.grad_z = static_cast<const float*>(data_or_null(call.grad_z));
  }

  const ScalarType dtype = q.scalar_type();
  const std::vector<int64_t> none{0}, q_shape{p.B, p.L, p.H, p.K}, k_shape{p.B, p.M, p.H, p.K};
  Tensor dq = empty(q, q_shape, dtype);
  Tensor dk = empty(q, k_shape, dtype);
  Tensor dv = empty(q, {p.B, p.M, p.H, p.V}, dtype);
  Tensor dq_den = empty(q, call.has_q_den ? q_shape : none, dtype);
  Tensor dk_den = empty(q, call.has_k_den ? k_shape : none, dtype);
  const ScalarType weight_dtype = p.weight_dtype == DType::kFloat32    ? ScalarType::Float
                                  : p.weight_dtype == DType::kBFloat16 ? ScalarType::BFloat16
                                                                       : ScalarType::Half;
  Tensor dweight = empty(q, call.has_weight ? std::vector<int64_t>{p.B, p.M, p.H} : none, weight_dtype);
  Tensor dinitial_state =
      empty(q, call.has_initial ? std::vector<int64_t>{p.N, p.H, p.K, p.V} : none, ScalarType::Float);
  Tensor dinitial_z = empty(q, call.has_initial ? std::vector<int64_t>{p.N, p.H, p.K} : none, ScalarType::Float);
  p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
  if (call.has_q_den) p.dq_den = dq_den.mutable_data_ptr();
  if (call.has_k_den) p.dk_den = dk_den.mutable_data_ptr();
  if (call.has_weight) p.dweight = dweight.mutable_data_ptr();
  if (call.has_initial) {
    p.dinitial_state = static_cast<float*>(dinitial_state.mutable_data_ptr());
    p.dinitial_z = static_cast<float*>(dinitial_z.mutable_data_ptr());
  }
  return {dq, dk, dv, dq_den, dk_den, dweight, dinitial_state, dinitial_z};
}

}  // namespace effvit
