// gated_linear_attention: declarations, relations between arguments, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "gated_linear_attention_params.h"

namespace effvit::ops {

#define EFFVIT_OPTIONALS                                                                                             \
  "g_head?: H | float strided, g_token?: B L H | float strided, g_channel?: B L H K | float, "                       \
  "cu_seqlens?: N+1 | int32 packed, initial_state?: N H K V | float32 packed; scale: float = 1., direction: int in " \
  "0..2 = 0"

// N: sequences, B or the segments of cu_seqlens. K', V': K and V, or 0 where both directions are summed.
struct gated_linear_attention : OpDefaults {
  static constexpr const char* kForward = "gated_linear_attention(q: B L H K, k: B L H K, v: B L H V, " EFFVIT_OPTIONALS
                                          ") -> out: B L H V, state: N H K' V' | float32";
  static constexpr const char* kBackward =
      "gated_linear_attention_backward(grad_out: B L H V, grad_state?: N H K' V' | float32 packed, q: B L H K, "
      "k: B L H K, v: B L H V, " EFFVIT_OPTIONALS
      ") -> dq: B L H K, dk: B L H K, dv: B L H V, dg_head?: H | float, dg_token?: B L H | float, "
      "dg_channel?: B L H K | float, dinitial_state?: N H K V | float32";
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
    const bool both = static_cast<GateDirection>(c.integer("direction")) == GateDirection::kBoth;
    effvit::check(!both || !c.given("initial_state"), c.op(),
                  "initial_state must be None when both directions are summed, got ", Integers(c["initial_state"]));
    const bool offsets = c.given("cu_seqlens");
    effvit::check(!offsets || c.dim("B") == 1, c.op(), "q must have a batch size of 1 when cu_seqlens is given, got ",
                  Integers(c["q"]));
    if (!offsets) c.dim("N") = c.dim("B");
    c.dim("K'") = both ? 0 : c.dim("K");
    c.dim("V'") = both ? 0 : c.dim("V");
  }

  static void check(const Call& c) {
    if (!c.readable || !c.given("cu_seqlens")) return;
    const int32_t* const offsets = static_cast<const int32_t*>(c["cu_seqlens"].data);
    const int64_t N = c.dim("N"), L = c.dim("L");
    bool ok = offsets[0] == 0 && offsets[N] == L;
    for (int64_t n = 0; n < N; ++n) ok = ok && offsets[n] <= offsets[n + 1];
    if (ok) return;
    const std::vector<int64_t> got(offsets, offsets + N + 1);
    fail(c.op(), "cu_seqlens must rise from 0 to the length of q, ", L, ", got ", Integers(got.data(), N + 1));
  }

  static GatedLinearAttentionParams params(const Call& c) {
    GatedLinearAttentionParams p;
    c.take("q", p.q, p.q_stride_b, p.q_stride_l, p.q_stride_h);
    c.take("k", p.k, p.k_stride_b, p.k_stride_l, p.k_stride_h);
    c.take("v", p.v, p.v_stride_b, p.v_stride_l, p.v_stride_h);
    c.take("grad_out", p.grad_out, p.grad_out_stride_b, p.grad_out_stride_l, p.grad_out_stride_h);
    if (c.given("g_head")) {
      c.take("g_head", p.g, p.g_stride_h), c.take("dg_head", p.dg);
      p.gate = GateKind::kHead, p.gate_dtype = c["g_head"].dtype;
    } else if (c.given("g_token")) {
      c.take("g_token", p.g, p.g_stride_b, p.g_stride_l, p.g_stride_h), c.take("dg_token", p.dg);
      p.gate = GateKind::kToken, p.gate_dtype = c["g_token"].dtype;
    } else if (c.given("g_channel")) {
      c.take("g_channel", p.g, p.g_stride_b, p.g_stride_l, p.g_stride_h), c.take("dg_channel", p.dg);
      p.gate = GateKind::kChannel, p.gate_dtype = c["g_channel"].dtype;
    }
    c.take("cu_seqlens", p.cu_seqlens), c.take("initial_state", p.initial_state);
    c.take("dq", p.dq), c.take("dk", p.dk), c.take("dv", p.dv), c.take("dinitial_state", p.dinitial_state);
    c.take("out", p.out);
    p.direction = static_cast<GateDirection>(c.integer("direction"));
    if (p.direction != GateDirection::kBoth) c.take("state", p.state), c.take("grad_state", p.grad_state);
    p.B = c.dim("B"), p.L = c.dim("L"), p.H = c.dim("H"), p.K = c.dim("K"), p.V = c.dim("V"), p.N = c.dim("N");
    p.scale = c.number("scale");
    p.dtype = c["q"].dtype;
    return p;
  }
};

#undef EFFVIT_OPTIONALS

}  // namespace effvit::ops
