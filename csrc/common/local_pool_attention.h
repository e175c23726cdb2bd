// local_pool_attention: declarations, limits, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "local_pool_attention_params.h"

namespace effvit::ops {

#define EFFVIT_INPUTS                                                                                           \
  "q: B H W h d, k: B H W h d, v: B H W h d, k_pool: B P h d, v_pool: B P h d, "                                \
  "local_bias?: h T | float32 packed, pool_bias?: h H*W P | float32 packed, q_scale?: h H*W | float32 packed, " \
  "q_embed?: h d | float32 packed, tokens?: h d T | float32 packed, token_bias?: h T | float32 packed; "        \
  "window: int in 3..7 = 3"

struct local_pool_attention : OpDefaults {
  static constexpr const char* kForward = "local_pool_attention(" EFFVIT_INPUTS ") -> out: B H W h d";
  static constexpr const char* kBackward =
      "local_pool_attention_backward(grad_out: B H W h d, " EFFVIT_INPUTS
      ") -> dq: B H W h d, dk: B H W h d, dv: B H W h d, dk_pool: B P h d, dv_pool: B P h d, "
      "dlocal_bias?: h T | float32, dpool_bias?: h H*W P | float32, dq_scale?: h H*W | float32, "
      "dq_embed?: h d | float32, dtokens?: h d T | float32, dtoken_bias?: h T | float32";
  static constexpr const char* kEmpty = "B H W h";

  static void derive(Call& c) {
    constexpr int64_t kMaxHeadDim = 256;
    effvit::check(c.dim("d") >= 1 && c.dim("d") <= kMaxHeadDim, c.op(),
                  "q must be a tensor with a head dim between 1 and ", kMaxHeadDim, ", got ", Integers(c["q"]));
    const int64_t window = c.integer("window");
    effvit::check(window % 2 == 1, c.op(), "window must be odd, got ", window);
    c.dim("T") = window * window;
  }

  static LocalPoolAttentionParams params(const Call& c) {
    LocalPoolAttentionParams p;
    c.take("q", p.q, p.q_stride_b, p.q_stride_y, p.q_stride_x, p.q_stride_h);
    c.take("k", p.k, p.k_stride_b, p.k_stride_y, p.k_stride_x, p.k_stride_h);
    c.take("v", p.v, p.v_stride_b, p.v_stride_y, p.v_stride_x, p.v_stride_h);
    c.take("k_pool", p.k_pool, p.k_pool_stride_b, p.k_pool_stride_p, p.k_pool_stride_h);
    c.take("v_pool", p.v_pool, p.v_pool_stride_b, p.v_pool_stride_p, p.v_pool_stride_h);
    c.take("grad_out", p.grad_out, p.grad_out_stride_b, p.grad_out_stride_y, p.grad_out_stride_x, p.grad_out_stride_h);
    c.take("local_bias", p.local_bias), c.take("pool_bias", p.pool_bias), c.take("q_scale", p.q_scale);
    c.take("q_embed", p.q_embed), c.take("tokens", p.tokens), c.take("token_bias", p.token_bias);
    c.take("out", p.out), c.take("dq", p.dq), c.take("dk", p.dk), c.take("dv", p.dv);
    c.take("dk_pool", p.dk_pool), c.take("dv_pool", p.dv_pool);
    c.take("dlocal_bias", p.dlocal_bias), c.take("dpool_bias", p.dpool_bias), c.take("dq_scale", p.dq_scale);
    c.take("dq_embed", p.dq_embed), c.take("dtokens", p.dtokens), c.take("dtoken_bias", p.dtoken_bias);
    p.B = c.dim("B"), p.H = c.dim("H"), p.W = c.dim("W"), p.h = c.dim("h"), p.d = c.dim("d"), p.P = c.dim("P");
    p.window = c.integer("window");
    p.dtype = c["q"].dtype;
    return p;
  }
};

#undef EFFVIT_INPUTS

}  // namespace effvit::ops
