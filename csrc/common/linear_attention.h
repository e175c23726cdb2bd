// linear_attention: declarations, relations between arguments, and the filling of its parameters.
#pragma once

#include "declaration.h"
#include "linear_attention_params.h"

namespace effvit::ops {

#define EFFVIT_OPTIONALS                                                                                  \
  "q_den?: B L H K, k_den?: B M H K, weight?: B M H | float strided, cu_seqlens?: N+1 | int32 packed, "   \
  "initial_state?: N H K V | float32 packed, initial_z?: N H K | float32 packed; "                        \
  "feature_map: int in 0..3 = 1, normalize: int in 0..3 = 1, eps: float = 1e-06, clamp_min: float = 0., " \
  "scale: float = 1., causal: bool = False, quadratic: bool = False"

// N: sequences, B or the segments of cu_seqlens. K', V': K and V, or 0 in the quadratic form, which keeps no state.
struct linear_attention : OpDefaults {
  static constexpr const char* kForward = "linear_attention(q: B L H K, k: B M H K, v: B M H V, " EFFVIT_OPTIONALS
                                          ") -> out: B L H V, state: N H K' V' | float32, z: N H K' | float32";
  static constexpr const char* kBackward =
      "linear_attention_backward(grad_out: B L H V, grad_state?: N H K' V' | float32 packed, "
      "grad_z?: N H K' | float32 packed, q: B L H K, k: B M H K, v: B M H V, state: N H K' V' | float32 whole, "
      "z: N H K' | float32 whole, " EFFVIT_OPTIONALS
      ") -> dq: B L H K, dk: B M H K, dv: B M H V, dq_den?: B L H K, dk_den?: B M H K, dweight?: B M H | float, "
      "dinitial_state?: N H K V | float32, dinitial_z?: N H K | float32";
  static constexpr const char* kEmpty = "B H";

  static void derive(Call& c) {
    constexpr int64_t kMaxDim = 256;
    for (const auto& [name, dim] : {std::pair<const char*, const char*>{"q", "K"}, {"v", "V"}}) {
      effvit::check(c.dim(dim) >= 1 && c.dim(dim) <= kMaxDim, c.op(), name, " must have a head dim between 1 and ",
                    kMaxDim, ", got ", Integers(c[name]));
    }
    const int64_t L = c.dim("L"), M = c.dim("M");
    const bool quadratic = c.flag("quadratic"), offsets = c.given("cu_seqlens");
    effvit::check(!c.flag("causal") || L == M, c.op(), "k must be as long as q when causal is True, ", L, ", got ", M);
    const bool normalized = static_cast<Normalize>(c.integer("normalize")) != Normalize::kNone;
    for (const char* name : {"q_den", "k_den"}) {
      effvit::check(normalized || !c.given(name), c.op(), name, " must be None when normalize is none, got ",
                    Integers(c[name]));
    }
    for (const char* name : {"cu_seqlens", "initial_state"}) {
      effvit::check(!quadratic || !c.given(name), c.op(), name, " must be None when quadratic is True, got ",
                    Integers(c[name]));
    }
    effvit::check(!offsets || c.dim("B") == 1, c.op(), "q must have a batch size of 1 when cu_seqlens is given, got ",
                  Integers(c["q"]));
    effvit::check(!offsets || L == M, c.op(), "k must be as long as q when cu_seqlens is given, ", L, ", got ", M);
    c.check_together("initial_state", "initial_z");
    if (!offsets) c.dim("N") = c.dim("B");
    c.dim("K'") = quadratic ? 0 : c.dim("K");
    c.dim("V'") = quadratic ? 0 : c.dim("V");
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

  static LinearAttentionParams params(const Call& c) {
    LinearAttentionParams p;
    c.take("q", p.q, p.q_stride_b, p.q_stride_l, p.q_stride_h);
    c.take("k", p.k, p.k_stride_b, p.k_stride_l, p.k_stride_h);
    c.take("v", p.v, p.v_stride_b, p.v_stride_l, p.v_stride_h);
    c.take("q_den", p.q_den, p.q_den_stride_b, p.q_den_stride_l, p.q_den_stride_h);
    c.take("k_den", p.k_den, p.k_den_stride_b, p.k_den_stride_l, p.k_den_stride_h);
    c.take("weight", p.weight, p.weight_stride_b, p.weight_stride_l, p.weight_stride_h);
    c.take("grad_out", p.grad_out, p.grad_out_stride_b, p.grad_out_stride_l, p.grad_out_stride_h);
    c.take("cu_seqlens", p.cu_seqlens);
    c.take("initial_state", p.initial_state), c.take("initial_z", p.initial_z);
    c.take("dq", p.dq), c.take("dk", p.dk), c.take("dv", p.dv), c.take("dq_den", p.dq_den);
    c.take("dk_den", p.dk_den), c.take("dweight", p.dweight);
    c.take("dinitial_state", p.dinitial_state), c.take("dinitial_z", p.dinitial_z);
    c.take("out", p.out);
    if (!c.flag("quadratic")) {
      c.take("state", p.state), c.take("z", p.z);
      c.take("grad_state", p.grad_state), c.take("grad_z", p.grad_z);
    }
    p.B = c.dim("B"), p.L = c.dim("L"), p.M = c.dim("M"), p.H = c.dim("H"), p.K = c.dim("K"), p.V = c.dim("V");
    p.N = c.dim("N");
    p.eps = c.number("eps"), p.clamp_min = c.number("clamp_min"), p.scale = c.number("scale");
    p.feature_map = static_cast<FeatureMap>(c.integer("feature_map"));
    p.normalize = static_cast<Normalize>(c.integer("normalize"));
    p.causal = c.flag("causal"), p.quadratic = c.flag("quadratic");
    p.dtype = c["q"].dtype, p.weight_dtype = c["weight"].dtype;
    return p;
  }
};

#undef EFFVIT_OPTIONALS

}  // namespace effvit::ops
