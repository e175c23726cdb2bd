// dwconv_glu: declarations, limits, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "dwconv_glu_params.h"

namespace effvit::ops {

struct dwconv_glu : OpDefaults {
  static constexpr const char* kForward =
      "dwconv_glu(x: B H W D, v?: B H W G, weight: C k k | float packed, bias?: C | float packed; "
      "act: int in 0..5 = 1, gate_first: bool = False) -> out: B H W C";
  static constexpr const char* kBackward =
      "dwconv_glu_backward(grad_out: B H W C, x: B H W D, weight: C k k | float packed, v?: B H W G, "
      "bias?: C | float packed; act: int in 0..5 = 1, gate_first: bool = False) -> "
      "dx: B H W D, dv?: B H W G, dweight: C k k | float, dbias?: C | float";
  static constexpr const char* kEmpty = "B H W C";

  static void derive(Call& c) {
    constexpr int64_t kMaxSize = 7;
    const int64_t k = c.dim("k"), D = c.dim("D"), C = c.dim("C");
    effvit::check(k >= 3 && k <= kMaxSize && k % 2 == 1, c.op(), "weight must be [C, k, k] with an odd k from 3 to ",
                  kMaxSize, ", got ", Integers(c["weight"]));
    if (const View* v = c.find("v")) {
      c.dim("G") = v->dim == 4 ? v->size[3] : 0;
      effvit::check(D == C, c.op(), "x must be [B, H, W, C] with the ", C, " channels of weight, got ",
                    Integers(c["x"]));
      effvit::check(c.dim("G") <= C, c.op(), "v must be [B, H, W, G] with at most ", C, " channels, got ",
                    Integers(*v));
    } else {
      c.dim("G") = D - C;
      effvit::check(D >= C && D - C <= C, c.op(), "x must be [B, H, W, C + G] with C = ", C,
                    " and at most as many gates when v is not given, got ", Integers(c["x"]));
    }
  }

  static DwconvGluParams params(const Call& c) {
    DwconvGluParams p;
    p.B = c.dim("B"), p.H = c.dim("H"), p.W = c.dim("W"), p.C = c.dim("C"), p.G = c.dim("G");
    c.take("k", p.k);
    p.dtype = c["x"].dtype, p.weight_dtype = c["weight"].dtype;
    c.take("x", p.x, p.x_stride_b, p.x_stride_y, p.x_stride_x);
    c.take("v", p.v, p.v_stride_b, p.v_stride_y, p.v_stride_x);
    c.take("weight", p.weight), c.take("bias", p.bias), c.take("out", p.out);
    if (const View* bias = c.find("bias")) p.bias_dtype = bias->dtype;
    c.take("grad_out", p.grad_out, p.grad_out_stride_b, p.grad_out_stride_y, p.grad_out_stride_x);
    c.take("dx", p.dx), c.take("dv", p.dv), c.take("dweight", p.dweight), c.take("dbias", p.dbias);
    p.dx_stride = c.dim("D"), p.dv_stride = p.G;
    if (!c.given("v")) {  // x holds both
      const bool gates_first = c.flag("gate_first");
      const int64_t bytes = element_bytes(p.dtype), x_at = (gates_first ? p.G : 0) * bytes,
                    v_at = (gates_first ? 0 : p.C) * bytes;
      p.v = at(p.x, v_at), p.x = at(p.x, x_at);
      p.v_stride_b = p.x_stride_b, p.v_stride_y = p.x_stride_y, p.v_stride_x = p.x_stride_x;
      if (p.dx) p.dv = at(p.dx, v_at), p.dx = at(p.dx, x_at);
      p.dv_stride = p.dx_stride;
    }
    if (p.G == 0) p.v = p.dv = nullptr;
    p.act = c.integer("act");
    return p;
  }

 private:
  static const void* at(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }
  static void* at(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }
};

}  // namespace effvit::ops
