// Checks and allocation of newton_pinv, shared by the CPU and the CUDA binding. No kernel code.
#pragma once

#include "newton_pinv_params.h"
#include "stable.h"

namespace effvit {

// What the parameter struct points to belongs to the caller's tensors.
struct NewtonPinvCall {
  NewtonPinvParams p;
  bool empty = false;  // nothing to compute
};

namespace newton_pinv_detail {

inline NewtonPinvCall check_matrices(const char* op, const char* name, const Tensor& t) {
  constexpr int64_t kMaxSize = 256;
  check(t.dim() == 4 && t.size(2) == t.size(3) && t.size(3) >= 1 && t.size(3) <= kMaxSize, op, name,
        " must be [B, H, m, m] with m between 1 and ", kMaxSize, ", got ", shape_of(t));
  check_float_dtype(op, name, t);
  NewtonPinvCall call;
  call.p.B = t.size(0), call.p.H = t.size(1), call.p.m = t.size(3);
  call.p.dtype = to_dtype(t.scalar_type());
  call.empty = call.p.B == 0 || call.p.H == 0;
  return call;
}

}  // namespace newton_pinv_detail

inline NewtonPinvCall newton_pinv_call(const char* op, const Tensor& a, int64_t iterations, double ridge, double step) {
  NewtonPinvCall call = newton_pinv_detail::check_matrices(op, "a", a);
  check_last_stride(op, "a", a);
  constexpr int64_t kMaxIterations = 1000;
  check(iterations >= 0 && iterations <= kMaxIterations, op, "iterations must be between 0 and ", kMaxIterations,
        ", got ", iterations);
  NewtonPinvParams& p = call.p;
  p.a = a.const_data_ptr();
  p.a_stride_b = a.stride(0), p.a_stride_h = a.stride(1), p.a_stride_i = a.stride(2);
  p.iterations = static_cast<int32_t>(iterations);
  p.ridge = check_finite(op, "ridge", ridge);
  check(ridge >= 0, op, "ridge must be at least 0, got ", ridge);
  p.step = check_positive(op, "step", step);
  return call;
}

// Allocates out and points the parameters to it.
inline Tensor newton_pinv_output(NewtonPinvParams& p, const Tensor& a) {
  Tensor out = empty(a, shape_of(a), a.scalar_type());
  p.out = out.mutable_data_ptr();
  return out;
}

inline NewtonPinvCall newton_pinv_backward_call(const char* op, const Tensor& grad_out, const Tensor& out) {
  NewtonPinvCall call = newton_pinv_detail::check_matrices(op, "out", out);
  check_shape(op, "grad_out", grad_out, "[B, H, m, m]", shape_of(out));
  check_dtype(op, "grad_out", grad_out, out.scalar_type(), "out");
  check_device(op, "grad_out", grad_out, out, "out");
  check_last_stride(op, "grad_out", grad_out);
  check(out.is_contiguous(), op, "out must be contiguous as the forward returned it, got another layout");
  NewtonPinvParams& p = call.p;
  p.out = const_cast<void*>(out.const_data_ptr());
  p.grad_out = grad_out.const_data_ptr();
  p.grad_out_stride_b = grad_out.stride(0), p.grad_out_stride_h = grad_out.stride(1);
  p.grad_out_stride_i = grad_out.stride(2);
  return call;
}

// Allocates da and points the parameters to it.
inline Tensor newton_pinv_gradient(NewtonPinvParams& p, const Tensor& out) {
  Tensor da = empty(out, shape_of(out), out.scalar_type());
  p.da = da.mutable_data_ptr();
  return da;
}

}  // namespace effvit
