// block_relu2_attention: declarations, limits, and the filling of its parameters.
#pragma once

#include "block_relu2_attention_params.h"
#include "declaration.h"

namespace effvit::ops {

struct block_relu2_attention : OpDefaults {
  static constexpr const char* kForward =
      "block_relu2_attention(q: B L K, k: B L K, v: B L V; group: int in 1..1024 = 256, causal: bool = False) -> "
      "out: B L V";
  static constexpr const char* kBackward =
      "block_relu2_attention_backward(grad_out: B L V, q: B L K, k: B L K, v: B L V; group: int in 1..1024 = 256, "
      "causal: bool = False) -> dq: B L K, dk: B L K, dv: B L V";
  static constexpr const char* kEmpty = "B L";

  static void derive(Call& c) {
    constexpr int64_t kMaxKey = 256, kMaxValue = 2048;
    effvit::check(c.dim("K") >= 1 && c.dim("K") <= kMaxKey, c.op(), "q must have between 1 and ", kMaxKey,
                  " columns, got ", Integers(c["q"]));
    effvit::check(c.dim("V") >= 1 && c.dim("V") <= kMaxValue, c.op(), "v must have between 1 and ", kMaxValue,
                  " columns, got ", Integers(c["v"]));
  }

  static BlockRelu2AttentionParams params(const Call& c) {
    BlockRelu2AttentionParams p;
    c.take("q", p.q, p.q_stride_b, p.q_stride_l);
    c.take("k", p.k, p.k_stride_b, p.k_stride_l);
    c.take("v", p.v, p.v_stride_b, p.v_stride_l);
    c.take("grad_out", p.grad_out, p.grad_out_stride_b, p.grad_out_stride_l);
    c.take("out", p.out), c.take("dq", p.dq), c.take("dk", p.dk), c.take("dv", p.dv);
    p.B = c.dim("B"), p.L = c.dim("L"), p.K = c.dim("K"), p.V = c.dim("V");
    p.group = c.integer("group"), p.causal = c.flag("causal");
    p.dtype = c["q"].dtype;
    return p;
  }
};

}  // namespace effvit::ops
