// Checks and allocation of rbf_gram, shared by the CPU and the CUDA binding. No kernel code.
#pragma once

#include "rbf_gram_params.h"
#include "stable.h"

namespace effvit {

// What the parameter struct points to belongs to the caller's tensors.
struct RbfGramCall {
  RbfGramParams p;
  bool empty = false;  // nothing to compute; gradients are then sums of nothing
};

inline RbfGramCall rbf_gram_call(const char* op, const Tensor& q, const Tensor& k, double gamma) {
  RbfGramCall call;
  RbfGramParams& p = call.p;
  check(q.dim() == 4, op, "q must be [B, L, H, D], got ", shape_of(q));
  check_float_dtype(op, "q", q);
  check(k.dim() == 4 && k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3), op,
        "k must be [B, M, H, D] like q ", shape_of(q), ", got ", shape_of(k));
  constexpr int64_t kMaxHeadDim = 256;
  check(q.size(3) >= 1 && q.size(3) <= kMaxHeadDim, op, "q must be a tensor with a head dim between 1 and ",
        kMaxHeadDim, ", got ", shape_of(q));
  check_last_stride(op, "q", q);
  check_dtype(op, "k", k, q.scalar_type(), "q");
  check_device(op, "k", k, q);
  check_last_stride(op, "k", k);
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr();
  p.B = q.size(0), p.L = q.size(1), p.M = k.size(1), p.H = q.size(2), p.D = q.size(3);
  p.q_stride_b = q.stride(0), p.q_stride_l = q.stride(1), p.q_stride_h = q.stride(2);
  p.k_stride_b = k.stride(0), p.k_stride_l = k.stride(1), p.k_stride_h = k.stride(2);
  p.gamma = check_positive(op, "gamma", gamma);
  p.dtype = to_dtype(q.scalar_type());
  call.empty = p.B == 0 || p.L == 0 || p.M == 0 || p.H == 0;
  return call;
}

// Allocates out and points the parameters to it.
inline Tensor rbf_gram_output(RbfGramParams& p, const Tensor& q) {
  Tensor out = empty(q, {p.B, p.H, p.L, p.M}, q.scalar_type());
  p.out = out.mutable_data_ptr();
  return out;
}

// Checks the backward's own arguments, allocates dq and dk and points the parameters to them. When there is nothing to
// compute they are zeros.
inline std::tuple<Tensor, Tensor> rbf_gram_backward_call(const char* op, RbfGramCall& call, const Tensor& grad_out,
                                                         const Tensor& q, const Tensor& k, const Tensor& out) {
  RbfGramParams& p = call.p;
  for (auto [name, t] : {std::pair<const char*, const Tensor*>{"grad_out", &grad_out}, {"out", &out}}) {
    check_shape(op, name, *t, "[B, H, L, M]", {p.B, p.H, p.L, p.M});
    check_dtype(op, name, *t, q.scalar_type(), "q");
    check_device(op, name, *t, q);
  }
  check_last_stride(op, "grad_out", grad_out);
  check(out.is_contiguous(), op, "out must be contiguous as the forward returned it, got another layout");
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_stride_b = grad_out.stride(0), p.grad_out_stride_h = grad_out.stride(1);
  p.grad_out_stride_l = grad_out.stride(2);
  p.out = const_cast<void*>(out.const_data_ptr());
  Tensor dq = empty(q, shape_of(q), q.scalar_type()), dk = empty(q, shape_of(k), q.scalar_type());
  if (call.empty) {
    torch::stable::zero_(dq);
    torch::stable::zero_(dk);
  }
  p.dq = dq.mutable_data_ptr();
  p.dk = dk.mutable_data_ptr();
  return {dq, dk};
}

}  // namespace effvit
