// gated_linear_attention_step on the CPU: a unit is one head of a batch item, whose state is read and written once. On
// raw pointers, compiled once per ISA.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace gated_linear_attention_step_impl {

using Params = GatedLinearAttentionStepParams;

int64_t units(const Params& p) { return p.B * p.H; }

template <class T>
void run_units(const Params& p, int64_t begin, int64_t end) {
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V), Kp = round_up(K, kLanes), Vp = round_up(V, kLanes);
  float* const q = static_cast<float*>(thread_scratch(static_cast<size_t>(3 * Kp + 2 * Vp) * sizeof(float)));
  float *const k = q + Kp, *const decay = k + Kp, *const v = decay + Kp, *const out = v + Vp;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / p.H, h = unit % p.H, gate = b * p.g_stride_b + h * p.g_stride_h;
    load_row(q, static_cast<const T*>(p.q) + b * p.q_stride_b + h * p.q_stride_h, K, p.scale);
    load_row(k, static_cast<const T*>(p.k) + b * p.k_stride_b + h * p.k_stride_h, K);
    load_row(v, static_cast<const T*>(p.v) + b * p.v_stride_b + h * p.v_stride_h, V);
    if (p.gate == GateKind::kChannel) {
      dispatch_dtype(p.gate_dtype,
                     [&](auto type) { load_row(decay, static_cast<const decltype(type)*>(p.g) + gate, K); });
    } else {
      const float g = p.gate == GateKind::kNone ? 0.f : load_scalar(p.g, p.gate_dtype, gate);
      for (int c = 0; c < Kp; c += kLanes) store(decay + c, set1(g));
    }
    for (int c = 0; c < Kp; c += kLanes) store(decay + c, exp(min(set1(88.f), load(decay + c))));
    zero(out, Vp);
    const float* const from = p.state + unit * p.K * p.V;
    float* const to = p.new_state + unit * p.K * p.V;
    for (int e = 0; e < V; e += 4 * kLanes) {
      for (int c = 0; c < K; ++c) {
        for (int j = e; j < std::min(e + 4 * kLanes, Vp); j += kLanes) {
          const int left = V - j;
          const vf s = fma(set1(decay[c]), load_lanes(from + int64_t{c} * V + j, left), set1(k[c]) * load(v + j));
          store_lanes(to + int64_t{c} * V + j, s, left);
          store(out + j, fma(set1(q[c]), s, load(out + j)));
        }
      }
    }
    store_row(static_cast<T*>(p.out) + unit * p.V, out, V);
  }
}

void run(const Params& p, float*, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) { run_units<decltype(type)>(p, begin, end); });
}

constexpr Step<Params> kForward[] = {{units, run}};

}  // namespace gated_linear_attention_step_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<GatedLinearAttentionStepParams>* EFFVIT_KERNEL_NAME(gated_linear_attention_step)() {
  namespace impl = EFFVIT_ISA_NAME::gated_linear_attention_step_impl;
  static constexpr Kernel<GatedLinearAttentionStepParams> kernel = {routine(impl::kForward), {}};
  return &kernel;
}
}  // namespace effvit::cpu
