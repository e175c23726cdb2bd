// newton_pinv: declarations, limits, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "newton_pinv_params.h"

namespace effvit::ops {

struct newton_pinv : OpDefaults {
  static constexpr const char* kForward =
      "newton_pinv(a: B H m m; iterations: int in 0..1000 = 20, ridge: float >= 0 = 0.01, step: float > 0 = 1.8) -> "
      "out: B H m m";
  static constexpr const char* kBackward =
      "newton_pinv_backward(grad_out: B H m m, out: B H m m | whole) -> da: B H m m";
  static constexpr const char* kEmpty = "B H";
  static constexpr const char* kShapeNote = " with m between 1 and 256";

  static void derive(Call& c) {
    const bool forward = c.given("a");
    effvit::check(c.dim("m") >= 1 && c.dim("m") <= 256, c.op(), forward ? "a" : "out", " must be [B, H, m, m]",
                  kShapeNote, ", got ", Integers(forward ? c["a"] : c["out"]));
  }

  static NewtonPinvParams params(const Call& c) {
    NewtonPinvParams p;
    c.take("a", p.a, p.a_stride_b, p.a_stride_h, p.a_stride_i);
    c.take("grad_out", p.grad_out, p.grad_out_stride_b, p.grad_out_stride_h, p.grad_out_stride_i);
    c.take("out", p.out), c.take("da", p.da);
    p.B = c.dim("B"), p.H = c.dim("H"), p.m = c.dim("m");
    if (c.given("a")) p.iterations = c.integer("iterations"), p.ridge = c.number("ridge"), p.step = c.number("step");
    p.dtype = c["out"].dtype;
    return p;
  }
};

}  // namespace effvit::ops
