// int_attention: declaration, limits, and the filling of its parameters.
#pragma once

#include "../rows/int_rows.h"
#include "int8_matmul.h"
#include "int_attention_params.h"

namespace effvit::ops {

struct int_attention : OpDefaults {
  static constexpr const char* kForward =
      "int_attention(q: B L H K | int8, k: B M H K | int8, v: B M H V | int8, bias?: W H L M | int32; "
      "score_multiplier: int in 1..2147483647, score_shift: int in 1..61, x0: int in -2147483647..-1, n: int in 4..30 "
      "= 15, bits: int in 2..16 = 8, half_bit: bool = True, score_bits: int in 8..16 = 8, multiplier: int in "
      "0..2147483647 = 0, shift: int in 0..61 = 0, out_bits: int in 2..32 = 32, out_dtype: int in 3..6 = 3) -> out: B "
      "L "
      "H V | out_dtype";
  static constexpr const char* kEmpty = "B L H V";

  static void derive(Call& c) {
    constexpr int64_t kMostDepth = 65536, kMostKeys = 1 << 24;
    effvit::check(c.dim("K") >= 1 && c.dim("K") <= kMostDepth, c.op(), "q must be [B, L, H, K] with K from 1 to ",
                  kMostDepth, ", got ", Integers(c["q"]));
    effvit::check(c.dim("M") >= 1 && c.dim("M") <= kMostKeys, c.op(), "k must be [B, M, H, K] with M from 1 to ",
                  kMostKeys, ", got ", Integers(c["k"]));
  }

  static void check(const Call& c) {
    check_shift_exp(c);
    check_rescale(c);
    if (const View* bias = c.find("bias")) {
      const int64_t w = bias->size[0], b = c.dim("B");
      effvit::check(w > 0 && b % w == 0, c.op(), "bias must be [W, H, L, M] with W a divisor of B = ", b, ", got ",
                    Integers(*bias));
    }
  }

  static IntAttentionParams params(const Call& c) {
    IntAttentionParams p;
    c.take("q", p.q, p.q_stride_b, p.q_stride_l, p.q_stride_h);
    c.take("k", p.k, p.k_stride_b, p.k_stride_l, p.k_stride_h);
    c.take("v", p.v, p.v_stride_b, p.v_stride_l, p.v_stride_h);
    c.take("bias", p.bias, p.bias_stride_w, p.bias_stride_h, p.bias_stride_l);
    c.take("out", p.out);
    p.B = c.dim("B"), p.L = c.dim("L"), p.M = c.dim("M"), p.H = c.dim("H"), p.K = c.dim("K"), p.V = c.dim("V");
    if (p.bias) p.W = c.dim("W");
    p.exp = shift_exp_of(c), p.bits = c.integer("bits");
    p.scores.multiplier = c.integer("score_multiplier"), p.scores.shift = c.integer("score_shift");
    set_ends(p.scores, c.integer("score_bits"), DType::kInt32);
    p.rescale = rescale_of(c, "out_bits"), p.out_dtype = c["out"].dtype;
    return p;
  }
};

}  // namespace effvit::ops
