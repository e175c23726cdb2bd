// rbf_gram: declarations, limits, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "rbf_gram_params.h"

namespace effvit::ops {

struct rbf_gram : OpDefaults {
  static constexpr const char* kForward = "rbf_gram(q: B L H D, k: B M H D; gamma: float > 0 = 0.5) -> out: B H L M";
  static constexpr const char* kBackward =
      "rbf_gram_backward(grad_out: B H L M, q: B L H D, k: B M H D, out: B H L M | whole; gamma: float > 0 = 0.5) -> "
      "dq: B L H D, dk: B M H D";
  static constexpr const char* kEmpty = "B L M H";

  static void derive(Call& c) {
    constexpr int64_t kMaxHeadDim = 256;
    effvit::check(c.dim("D") >= 1 && c.dim("D") <= kMaxHeadDim, c.op(),
                  "q must be a tensor with a head dim between 1 and ", kMaxHeadDim, ", got ", Integers(c["q"]));
  }

  static RbfGramParams params(const Call& c) {
    RbfGramParams p;
    c.take("q", p.q, p.q_stride_b, p.q_stride_l, p.q_stride_h);
    c.take("k", p.k, p.k_stride_b, p.k_stride_l, p.k_stride_h);
    c.take("grad_out", p.grad_out, p.grad_out_stride_b, p.grad_out_stride_h, p.grad_out_stride_l);
    c.take("out", p.out), c.take("dq", p.dq), c.take("dk", p.dk);
    p.B = c.dim("B"), p.L = c.dim("L"), p.M = c.dim("M"), p.H = c.dim("H"), p.D = c.dim("D");
    p.gamma = c.number("gamma");
    p.dtype = c["q"].dtype;
    return p;
  }
};

}  // namespace effvit::ops
