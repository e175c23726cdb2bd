// aft: declarations, limits, and the filling of its parameters.
#pragma once

#include "aft_params.h"
#include "declaration.h"

namespace effvit::ops {

// L': L, or 1 without a bias, where all queries see the same.
struct aft : OpDefaults {
  static constexpr const char* kForward =
      "aft(q: B L C, k: B M C, v: B M C, bias?: L M | float strided; window: int in 0..2147483647 = 0) -> out: B L C, "
      "mean: B L' C | float32, lse: B L' C | float32";
  static constexpr const char* kBackward =
      "aft_backward(grad_out: B L C, grad_mean?: B L' C | float32 packed, grad_lse?: B L' C | float32 packed, "
      "q: B L C, k: B M C, v: B M C, mean: B L' C | float32 whole, lse: B L' C | float32 whole, "
      "bias?: L M | float strided; window: int in 0..2147483647 = 0) -> dq: B L C, dk: B M C, dv: B M C, dbias?: L M | "
      "float";
  static constexpr const char* kEmpty = "B L C";

  static void derive(Call& c) {
    effvit::check(c.dim("M") >= 1, c.op(), "k must have at least one token, got ", Integers(c["k"]));
    c.dim("L'") = c.given("bias") || c.dim("L") == 0 ? c.dim("L") : 1;
  }

  static AftParams params(const Call& c) {
    AftParams p;
    c.take("q", p.q, p.q_stride_b, p.q_stride_l);
    c.take("k", p.k, p.k_stride_b, p.k_stride_l);
    c.take("v", p.v, p.v_stride_b, p.v_stride_l);
    c.take("bias", p.bias, p.bias_stride_l, p.bias_stride_m);
    c.take("grad_out", p.grad_out, p.grad_out_stride_b, p.grad_out_stride_l);
    c.take("grad_mean", p.grad_mean), c.take("grad_lse", p.grad_lse);
    c.take("out", p.out), c.take("mean", p.mean), c.take("lse", p.lse);
    c.take("dq", p.dq), c.take("dk", p.dk), c.take("dv", p.dv), c.take("dbias", p.dbias);
    p.B = c.dim("B"), p.L = c.dim("L"), p.M = c.dim("M"), p.C = c.dim("C");
    p.window = c.integer("window");
    p.dtype = c["q"].dtype;
    if (c.given("bias")) p.bias_dtype = c["bias"].dtype;
    return p;
  }
};

}  // namespace effvit::ops
