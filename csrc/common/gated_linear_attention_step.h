// gated_linear_attention_step: declaration, relations between arguments, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "gated_linear_attention_step_params.h"

namespace effvit::ops {

struct gated_linear_attention_step : OpDefaults {
  static constexpr const char* kForward =
      "gated_linear_attention_step(q: B H K, k: B H K, v: B H V, state: B H K V | float32 packed, "
      "g_head?: H | float strided, g_token?: B H | float strided, g_channel?: B H K | float; scale: float = 1.) -> "
      "out: B H V, new_state: B H K V | float32";
  static constexpr const char* kEmpty = "B H";

  static void derive(Call& c) {
    constexpr int64_t kMaxDim = 256;
    for (const auto& [name, dim] : {std::pair<const char*, const char*>{"q", "K"}, {"v", "V"}}) {
      effvit::check(c.dim(dim) >= 1 && c.dim(dim) <= kMaxDim, c.op(), name, " must have a head dim between 1 and ",
                    kMaxDim, ", got ", Integers(c[name]));
    }
    const char* gate = nullptr;
    for (const char* name : {"g_head", "g_token", "g_channel"}) {
      if (!c.given(name)) continue;
      effvit::check(!gate, c.op(), name, " must be None when ", gate ? gate : "", " is given, got ", Integers(c[name]));
      gate = name;
    }
  }

  static GatedLinearAttentionStepParams params(const Call& c) {
    GatedLinearAttentionStepParams p;
    c.take("q", p.q, p.q_stride_b, p.q_stride_h);
    c.take("k", p.k, p.k_stride_b, p.k_stride_h);
    c.take("v", p.v, p.v_stride_b, p.v_stride_h);
    if (c.given("g_head")) {
      c.take("g_head", p.g, p.g_stride_h);
      p.gate = GateKind::kHead, p.gate_dtype = c["g_head"].dtype;
    } else if (c.given("g_token")) {
      c.take("g_token", p.g, p.g_stride_b, p.g_stride_h);
      p.gate = GateKind::kToken, p.gate_dtype = c["g_token"].dtype;
    } else if (c.given("g_channel")) {
      c.take("g_channel", p.g, p.g_stride_b, p.g_stride_h);
      p.gate = GateKind::kChannel, p.gate_dtype = c["g_channel"].dtype;
    }
    c.take("state", p.state), c.take("out", p.out), c.take("new_state", p.new_state);
    p.B = c.dim("B"), p.H = c.dim("H"), p.K = c.dim("K"), p.V = c.dim("V");
    p.scale = c.number("scale");
    p.dtype = c["q"].dtype;
    return p;
  }
};

}  // namespace effvit::ops
