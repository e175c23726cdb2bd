// int8_attention: declaration, relations between arguments, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "int8_attention_params.h"

namespace effvit::ops {

struct int8_attention : OpDefaults {
  static const char* name_of(DType t) {  // of a `number`
    const bool half = t == DType::kFloat16;
    return t == DType::kFloat32    ? "torch.float32"
           : t == DType::kBFloat16 ? "torch.bfloat16"
           : half                  ? "torch.float16"
                                   : "torch.int8";
  }

  static constexpr const char* kForward =
      "int8_attention(q: B L H K, k: B M G K | number, v: B M G V | number, k_scale?: B N G | float32 packed, "
      "v_scale?: B N G V | float32 packed, k_mean?: B G K | float32 packed, bias?: W H L M | float; "
      "scale: float? > 0 = None, causal: bool = False, smooth_k: bool = True, exponential: int in 0..1 = 0) -> "
      "out: B L H V, lse: B H L | float32";
  static constexpr const char* kEmpty = "B L H";

  static void derive(Call& c) {
    for (const auto& [name, dim] : {std::pair<const char*, const char*>{"q", "K"}, {"v", "V"}}) {
      effvit::check(c.dim(dim) >= 1 && c.dim(dim) <= 256, c.op(), name, " must have a head dim between 1 and 256, got ",
                    Integers(c[name]));
    }
    effvit::check(c.dim("M") >= 1, c.op(), "k must have at least one key, got ", Integers(c["k"]));
    effvit::check(c.dim("G") >= 1, c.op(), "k must have at least one head, got ", Integers(c["k"]));
    c.dim("N") = (c.dim("M") + kAttentionBlock - 1) / kAttentionBlock;
    effvit::check(c.dim("H") % c.dim("G") == 0, c.op(), "k must be of heads that divide those of q, ", c.dim("H"),
                  ", got ", Integers(c["k"]));
    const DType k = c["k"].dtype, v = c["v"].dtype;
    effvit::check(k == v, c.op(), "v must be ", name_of(k), " like k, got ", name_of(v));
    for (const char* name : {"k_scale", "v_scale"}) {
      const bool given = c.given(name), expected = k == DType::kInt8;
      effvit::check(given || !expected, c.op(), name, " must be given where k and v are int8, got None");
      effvit::check(!given || expected, c.op(), name, " must be None where k and v are not int8, got ", name,
                    " with k ", name_of(k));
    }
    effvit::check(!c.given("k_mean") || k == DType::kInt8 || c.flag("smooth_k"), c.op(),
                  "k_mean must be None without smooth_k, got k_mean");
  }

  static void check(const Call& c) {
    if (c.given("bias")) {
      effvit::check(c.dim("W") > 0 && c.dim("B") % c.dim("W") == 0, c.op(),
                    "bias must be [W, H, L, M] with W a divisor of B = ", c.dim("B"), ", got ", Integers(c["bias"]));
    }
    const View* scale = c.find("k_scale");
    if (!scale || !c.readable) return;
    const auto* const x = static_cast<const float*>(scale->data);
    for (int64_t i = 0; i < scale->count(); ++i) {
      if (!(x[i] < 0.f)) continue;
      const int64_t groups = c.dim("G"), blocks = c.dim("N"), row = i / groups;
      const int64_t at[3] = {row / blocks, row % blocks, i % groups};
      effvit::fail(c.op(), "k_scale must be at least 0, got ", x[i], " at ", Integers(at, 3));
    }
  }

  static Int8AttentionParams params(const Call& c) {
    Int8AttentionParams p;
    c.take("q", p.q, p.q_stride_b, p.q_stride_l, p.q_stride_h);
    c.take("k", p.k, p.k_stride_b, p.k_stride_m, p.k_stride_h);
    c.take("v", p.v, p.v_stride_b, p.v_stride_m, p.v_stride_h);
    c.take("k_scale", p.k_scale), c.take("v_scale", p.v_scale), c.take("k_mean", p.k_mean);
    c.take("bias", p.bias, p.bias_stride_w, p.bias_stride_h, p.bias_stride_l);
    c.take("out", p.out), c.take("lse", p.lse);
    p.B = c.dim("B"), p.L = c.dim("L"), p.H = c.dim("H"), p.K = c.dim("K"), p.M = c.dim("M"), p.G = c.dim("G");
    p.V = c.dim("V"), p.N = c.dim("N");
    if (p.bias) p.W = c.dim("W");
    const double scale = c.option("scale").given ? c.option("scale").number : std::pow(static_cast<double>(p.K), -0.5);
    p.scale = static_cast<float>(scale);
    p.base2_scale = static_cast<float>(scale * 1.4426950408889634);  // log2(e)
    p.causal = c.flag("causal"), p.smooth_k = c.flag("smooth_k"), p.shiftmax = c.integer("exponential") == 1;
    if (p.shiftmax) p.step = static_cast<float>(8192.0 * 0.6931471805599453);  // ln(2)
    p.dtype = c["q"].dtype, p.kv_dtype = c["k"].dtype, p.bias_dtype = c["bias"].dtype;
    return p;
  }
};

}  // namespace effvit::ops
