// dwconv: declarations, limits, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "dwconv_params.h"

namespace effvit::ops {

#define EFFVIT_OPTIONALS                                                                  \
  "bias?: C | float packed, pregate?: B H W C, postgate?: B P Q C, state?: B H px C; "    \
  "before: int[2](py, px) in 0..16777216 = 0, after: int[2](qy, qx) in 0..16777216 = 0, " \
  "dilation: int[2](dy, dx) in 1..32768 = 1, window: int[2](wh, ww) in 0..16777216 = 0, act: int in 0..5 = 5"

struct dwconv : OpDefaults {
  static constexpr const char* kForward =
      "dwconv(x: B H W C, weight: C kh kw | float packed, " EFFVIT_OPTIONALS ") -> out: B P Q C";
  static constexpr const char* kBackward =
      "dwconv_backward(grad_out: B P Q C, x: B H W C, weight: C kh kw | float packed, " EFFVIT_OPTIONALS
      ") -> dx: B H W C, dweight: C kh kw | float, dbias?: C | float, dpregate?: B H W C, dpostgate?: B P Q C, "
      "dstate?: B H px C";
  static constexpr const char* kEmpty = "B P Q C";

  static void derive(Call& c) {
    const int64_t kh = c.dim("kh"), kw = c.dim("kw"), H = c.dim("H"), W = c.dim("W");
    effvit::check(kh >= 1 && kw >= 1, c.op(), "weight must be [C, kh, kw] with at least one row and column, got ",
                  Integers(c["weight"]));
    constexpr int64_t kMost = int64_t{1} << 40;  // sums of positions stay far below 2^63
    effvit::check(kh <= kMost && kw <= kMost && H <= kMost && W <= kMost, c.op(), "x must be smaller, got ",
                  Integers(c["x"]));
    const int64_t reach[] = {c.dim("dy") * (kh - 1), c.dim("dx") * (kw - 1)};
    const int64_t grown[] = {c.dim("py") + c.dim("qy") - reach[0], c.dim("px") + c.dim("qx") - reach[1]};
    const int64_t wh = c.dim("wh"), ww = c.dim("ww");
    if (wh || ww) {
      effvit::check(wh && ww && H % wh == 0 && W % ww == 0, c.op(), "window must be [0, 0], or divide the map of ",
                    Integers(c["x"]), ", got ", Integers(c.option("window").integers, 2));
      effvit::check(grown[0] == 0 && grown[1] == 0, c.op(),
                    "after must be such that windows keep their size: before + after = ", Integers(reach, 2), ", got ",
                    Integers(c.option("after").integers, 2));
    }
    c.dim("P") = H + grown[0], c.dim("Q") = W + grown[1];
    effvit::check(c.dim("P") >= 0 && c.dim("Q") >= 0, c.op(), "x must be [B, H, W, C] with H and W of at least ",
                  std::max<int64_t>(0, -grown[0]), " and ", std::max<int64_t>(0, -grown[1]), ", got ",
                  Integers(c["x"]));
    if (const View* state = c.find("state")) {
      effvit::check(kh == 1 && !c.dim("py") && !c.dim("qy") && !wh, c.op(),
                    "state must be None where weight has more than one row, and with padding of rows or windows, got ",
                    Integers(*state));
    }
  }

  static DwconvParams params(const Call& c) {
    DwconvParams p;
    p.B = c.dim("B"), p.C = c.dim("C"), p.kh = c.dim("kh"), p.kw = c.dim("kw");
    p.H = c.dim("H"), p.W = c.dim("W"), p.P = c.dim("P"), p.Q = c.dim("Q");
    p.out_stride_b = p.P * p.Q * p.C, p.out_stride_y = p.Q * p.C, p.out_stride_x = p.C;
    p.dx_stride_b = p.H * p.W * p.C, p.dx_stride_y = p.W * p.C, p.dx_stride_x = p.C;
    if (const int64_t wh = c.dim("wh"), ww = c.dim("ww"); wh) {
      p.windows_y = p.H / wh, p.windows_x = p.W / ww;
      p.H = p.P = wh, p.W = p.Q = ww;
    }
    p.pad_y = c.dim("py"), p.pad_x = c.dim("px"), p.step_y = c.dim("dy"), p.step_x = c.dim("dx");
    p.dtype = c["x"].dtype, p.weight_dtype = c["weight"].dtype;
    if (const View* bias = c.find("bias")) p.bias_dtype = bias->dtype;
    c.take("x", p.x, p.x_stride_b, p.x_stride_y, p.x_stride_x);
    c.take("pregate", p.pregate, p.pregate_stride_b, p.pregate_stride_y, p.pregate_stride_x);
    c.take("postgate", p.postgate, p.postgate_stride_b, p.postgate_stride_y, p.postgate_stride_x);
    c.take("state", p.state, p.state_stride_b, p.state_stride_y, p.state_stride_x);
    c.take("grad_out", p.grad_out, p.grad_out_stride_b, p.grad_out_stride_y, p.grad_out_stride_x);
    c.take("weight", p.weight), c.take("bias", p.bias), c.take("out", p.out);
    c.take("dx", p.dx), c.take("dweight", p.dweight), c.take("dbias", p.dbias);
    c.take("dpregate", p.dpregate), c.take("dpostgate", p.dpostgate), c.take("dstate", p.dstate);
    if (p.pad_x == 0) p.state = nullptr;
    bring_near(p.H, p.P, p.kh, p.pad_y, p.step_y);
    if (!p.state) bring_near(p.W, p.Q, p.kw, p.pad_x, p.step_x);
    p.act = c.integer("act");
    return p;
  }

 private:
  // Taps further apart than an axis and its output are long meet the axis in the same places from a smaller distance:
  // output o sees position o - pad + tap * step. Scratch of the kernels is as large as the distance.
  static void bring_near(int64_t in, int64_t out, int64_t taps, int64_t& pad, int64_t& step) {
    const int64_t most = taps == 1 ? 1 : std::max<int64_t>(1, in + out);
    if (taps == 1 || step <= most) {
      step = std::min(step, most);
      return;
    }
    int64_t rest = pad % step;  // of the tap just before output 0; the next one is step - rest behind
    if (rest >= out) rest = step - rest < in ? most - (step - rest) : out;
    pad = pad / step * most + rest, step = most;
  }
};

#undef EFFVIT_OPTIONALS

}  // namespace effvit::ops
