// window_attention: declarations, relations between arguments, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "window_attention_params.h"

namespace effvit::ops {

#define EFFVIT_OPTIONALS                                                                                     \
  "bias_table?: h 2*wh-1+2*halo_h 2*ww-1+2*halo_w | float strided, logit_scale?: h | float packed, "         \
  "pad_k?: h d | packed, pad_v?: h dv | packed; "                                                            \
  "window: int[2](wh, ww) in 1..32768, shift: int[2](shift_h, shift_w) in 0..32768 = 0, "                    \
  "dilation: int[2](dilation_h, dilation_w) in 1..32768 = 1, halo: int[2](halo_h, halo_w) in 0..32768 = 0, " \
  "scale: float? = None, mask_value: float = -100., roll_before_pad: bool = False"

struct window_attention : OpDefaults {
  static constexpr const char* kForward =
      "window_attention(q: B H W h d, k: B H W h d, v: B H W h dv, " EFFVIT_OPTIONALS
      ") -> out: B H W h dv, lse: B h H W | float32";
  static constexpr const char* kBackward =
      "window_attention_backward(grad_out: B H W h dv, grad_lse?: B h H W | float32 packed, q: B H W h d, "
      "k: B H W h d, v: B H W h dv, out: B H W h dv | whole, lse: B h H W | float32 whole, " EFFVIT_OPTIONALS
      ", packed: bool = False) -> dq: B H W h' d', dk: B' H W h d, dv: B' H W h dv, "
      "dbias_table?: h 2*wh-1+2*halo_h 2*ww-1+2*halo_w | float, dlogit_scale?: h | float, dpad_k?: h d, dpad_v?: h dv";
  static constexpr const char* kEmpty = "B H W h";

  static void derive(Call& c) {
    for (const auto& [name, dim] : {std::pair<const char*, const char*>{"q", "d"}, {"v", "dv"}}) {
      effvit::check(c.dim(dim) >= 1, c.op(), name, " must have a head dim of at least 1, got ", Integers(c[name]));
    }
    constexpr int64_t kMaxSide = int64_t{1} << 24;  // positions on one axis stay far below int32
    effvit::check(c.dim("H") <= kMaxSide && c.dim("W") <= kMaxSide, c.op(), "q must have H and W of at most ", kMaxSide,
                  ", got ", Integers(c["q"]));
    effvit::check(c.dim("shift_h") < c.dim("wh") && c.dim("shift_w") < c.dim("ww"), c.op(),
                  "shift must be in [0, window) for window ", Integers(c.option("window").integers, 2), ", got ",
                  Integers(c.option("shift").integers, 2));
    effvit::check((c.dim("wh") + 2 * c.dim("halo_h")) * c.dim("dilation_h") <= kMaxSide &&
                      (c.dim("ww") + 2 * c.dim("halo_w")) * c.dim("dilation_w") <= kMaxSide,
                  c.op(), "dilation must be such that (window + 2*halo) * dilation is at most ", kMaxSide, ", got ",
                  Integers(c.option("dilation").integers, 2));
    effvit::check(!c.option("scale").given || !c.given("logit_scale"), c.op(),
                  "scale must be None when logit_scale is given, got ", c.option("scale").number);
    c.check_together("pad_k", "pad_v");
    if (!c.has_option("packed")) return;
    // dq, dk and dv are one tensor: dq has the shape of all three, dk and dv are empty.
    const bool packed = c.flag("packed");
    const int64_t h = c.dim("h"), d = c.dim("d");
    c.dim("h'") = packed ? 1 : h;
    c.dim("d'") = packed ? h * (2 * d + c.dim("dv")) : d;
    c.dim("B'") = packed ? 0 : c.dim("B");
  }

  static WindowAttentionParams params(const Call& c) {
    WindowAttentionParams p;
    c.take("q", p.q, p.q_stride_b, p.q_stride_y, p.q_stride_x, p.q_stride_h);
    c.take("k", p.k, p.k_stride_b, p.k_stride_y, p.k_stride_x, p.k_stride_h);
    c.take("v", p.v, p.v_stride_b, p.v_stride_y, p.v_stride_x, p.v_stride_h);
    c.take("grad_out", p.grad_out, p.grad_out_stride_b, p.grad_out_stride_y, p.grad_out_stride_x, p.grad_out_stride_h);
    c.take("bias_table", p.bias_table, p.bias_stride_h, p.bias_stride_y, p.bias_stride_x);
    c.take("logit_scale", p.logit_scale), c.take("pad_k", p.pad_k), c.take("pad_v", p.pad_v);
    c.take("out", p.out), c.take("lse", p.lse), c.take("grad_lse", p.grad_lse);
    c.take("dq", p.dq), c.take("dk", p.dk), c.take("dv", p.dvalue);
    c.take("dbias_table", p.dbias_table), c.take("dlogit_scale", p.dlogit_scale);
    c.take("dpad_k", p.dpad_k), c.take("dpad_v", p.dpad_v);
    p.B = c.dim("B"), p.H = c.dim("H"), p.W = c.dim("W"), p.h = c.dim("h"), p.d = c.dim("d"), p.dv = c.dim("dv");
    p.dq_stride_t = p.dk_stride_t = p.h * p.d, p.dvalue_stride_t = p.h * p.dv;
    if (c.has_option("packed") && c.flag("packed")) {
      const int64_t bytes = p.h * p.d * element_bytes(c["q"].dtype);
      p.dk = static_cast<char*>(p.dq) + bytes, p.dvalue = static_cast<char*>(p.dq) + 2 * bytes;
      p.dq_stride_t = p.dk_stride_t = p.dvalue_stride_t = p.h * (2 * p.d + p.dv);
    }
    c.take("wh", p.window_h), c.take("ww", p.window_w);
    c.take("shift_h", p.shift_h), c.take("shift_w", p.shift_w);
    c.take("dilation_h", p.dilation_h), c.take("dilation_w", p.dilation_w);
    c.take("halo_h", p.halo_h), c.take("halo_w", p.halo_w);
    p.scale =
        c.option("scale").given ? c.number("scale") : static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.d)));
    p.mask_value = c.number("mask_value");
    p.roll_before_pad = c.flag("roll_before_pad");
    p.dtype = c["q"].dtype;
    p.bias_dtype = c["bias_table"].dtype, p.logit_scale_dtype = c["logit_scale"].dtype;
    return p;
  }
};

#undef EFFVIT_OPTIONALS

}  // namespace effvit::ops
