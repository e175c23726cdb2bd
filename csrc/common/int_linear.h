// int_linear: declaration, limits, and the filling of its parameters.
#pragma once

#include "int8_epilogue.h"
#include "int_linear_params.h"
#include "int_rescale.h"

namespace effvit::ops {

struct int_linear : OpDefaults {
  static constexpr const char* kForward =
      "int_linear(x: M K | int8, weight: R C | int8, multiplier?: N | int32 packed, shift?: N | int32 packed, bias?: N "
      "| int32 packed, residual?: M N | integer, residual_multiplier?: N | int32 packed, residual_shift?: N | int32 "
      "packed; bits: int in 2..32 = 8, out_dtype: int in 3..6) -> out: M N | out_dtype";
  static constexpr const char* kEmpty = "M N";
  static constexpr int64_t kMaxDepth = 131071;  // 128 * 128 * K < 2^31: no sum of products overflows

  static void derive(Call& c) {
    const int64_t k = c.dim("K"), rows = c.dim("R"), width = 64 * ((k + 3) / 4 + 1);
    effvit::check(k <= kMaxDepth, c.op(), "x must be [M, K] with K at most ", kMaxDepth,
                  ", or the int32 sums could overflow, got ", Integers(c["x"]));
    if (c.dim("C") == k) {
      c.dim("N") = rows;
      return;
    }
    effvit::check(c.dim("C") == width, c.op(), "weight must be [N, K] = [N, ", k,
                  "] or packed by int8_prepack, [ceil(N / 16), ", width, "], like x, got ", Integers(c["weight"]));
    const char* const name = c.given("bias") ? "bias" : "multiplier";
    const View* const v = c.find(name);
    effvit::check(v != nullptr, c.op(),
                  "bias must be given, or multiplier, where weight is packed: they say what N is, got None");
    effvit::check(v->dim == 1 && (v->size[0] + 15) / 16 == rows, c.op(), name,
                  " must be [N] with ceil(N / 16) = ", rows, " like the packed weight, got ", Integers(*v));
    c.dim("N") = v->size[0];
  }

  static void check(const Call& c) {
    c.check_together("multiplier", "shift");
    c.check_together("residual", "residual_multiplier");
    c.check_together("residual", "residual_shift");
    if (!c.given("multiplier")) {
      effvit::check(!c.given("residual"), c.op(), "multiplier must be given together with residual, got None");
      effvit::check(c.integer("bits") == 8, c.op(), "bits must be left at 8 without multiplier, got ",
                    c.integer("bits"));
    }
    check_rescaling(c, "multiplier", "shift");
    check_rescaling(c, "residual_multiplier", "residual_shift");
    if (c.dim("C") > c.dim("K")) check_label(c, "weight", "int8_prepack", Packed::kInt8, c.dim("N"), c.dim("K"));
  }

  static IntLinearParams params(const Call& c) {
    IntLinearParams p;
    c.take("x", p.x, p.x_stride_m), c.take("weight", p.weight, p.weight_stride_n);
    c.take("multiplier", p.multiplier), c.take("shift", p.shift), c.take("bias", p.bias);
    c.take("residual", p.residual, p.residual_stride_m);
    c.take("residual_multiplier", p.residual_multiplier), c.take("residual_shift", p.residual_shift);
    c.take("out", p.out);
    if (const View* v = c.find("residual")) p.residual_dtype = v->dtype;
    p.M = c.dim("M"), p.N = c.dim("N"), p.K = c.dim("K");
    p.packed = c.dim("C") > p.K;
    p.largest_sum = 128 * 128 * p.K;
    p.out_dtype = c["out"].dtype;
    const Ends ends = ends_of(p.out_dtype, p.multiplier ? c.integer("bits") : 32);
    p.low = ends.low, p.high = ends.high;
    return p;
  }
};

}  // namespace effvit::ops
