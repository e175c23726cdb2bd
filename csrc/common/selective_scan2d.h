// selective_scan2d: declarations, limits, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "selective_scan2d_params.h"

namespace effvit::ops {

struct selective_scan2d : OpDefaults {
  static constexpr const char* kForward =
      "selective_scan2d(x: B H W D, dt: B H W 4 D, b: B H W 4 N, c: B H W 4 N, a: 4 D N | float32 packed, "
      "d?: 4 D | float32 packed, dt_bias?: 4 D | float32 packed; softplus: bool = True) -> out: B H W D | float32";
  static constexpr const char* kBackward =
      "selective_scan2d_backward(grad_out: B H W D | float32 packed, x: B H W D, dt: B H W 4 D, b: B H W 4 N, "
      "c: B H W 4 N, a: 4 D N | float32 packed, d?: 4 D | float32 packed, dt_bias?: 4 D | float32 packed; "
      "softplus: bool = True) -> dx: B H W D, ddt: B H W 4 D, db: B H W 4 N, dc: B H W 4 N, da: 4 D N | float32, "
      "dd?: 4 D | float32, ddt_bias?: 4 D | float32";
  static constexpr const char* kEmpty = "B H W D";

  static void derive(Call& c) {
    constexpr int64_t kMaxStates = 256;
    effvit::check(c.dim("N") >= 1 && c.dim("N") <= kMaxStates, c.op(), "b must have between 1 and ", kMaxStates,
                  " states, got ", Integers(c["b"]));
  }

  static SelectiveScan2dParams params(const Call& c) {
    SelectiveScan2dParams p;
    c.take("x", p.x, p.x_stride_b, p.x_stride_y, p.x_stride_x);
    c.take("dt", p.dt, p.dt_stride_b, p.dt_stride_y, p.dt_stride_x, p.dt_stride_s);
    c.take("b", p.b, p.b_stride_b, p.b_stride_y, p.b_stride_x, p.b_stride_s);
    c.take("c", p.c, p.c_stride_b, p.c_stride_y, p.c_stride_x, p.c_stride_s);
    c.take("a", p.a), c.take("d", p.d), c.take("dt_bias", p.dt_bias), c.take("out", p.out);
    c.take("grad_out", p.grad_out);
    c.take("dx", p.dx), c.take("ddt", p.ddt), c.take("db", p.db), c.take("dc", p.dc), c.take("da", p.da);
    c.take("dd", p.dd), c.take("ddt_bias", p.ddt_bias);
    p.B = c.dim("B"), p.H = c.dim("H"), p.W = c.dim("W"), p.D = c.dim("D"), p.N = c.dim("N");
    p.softplus = c.flag("softplus");
    p.dtype = c["x"].dtype;
    return p;
  }
};

}  // namespace effvit::ops
