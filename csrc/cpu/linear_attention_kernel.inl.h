// linear_attention on the CPU: entry points. On raw pointers, compiled once per ISA.
//
// Tokens lie as [B, L, H, D], so one head's rows are far apart. A unit of work is (sequence, range of tokens, group of
// heads): it walks its tokens in chunks, all heads of the group within a chunk, so that memory is read once and in long
// runs, while the states of the group stay in the L2 cache. A chunk of one head goes through L1 scratch in float32,
// with the feature map and the weight applied on the way, and from there through register-tiled products; for products
// of bfloat16, in bfloat16.
#pragma once

#include "linear_attention_plan.inl.h"

#include "linear_attention_features.inl.h"

#include "linear_attention_bf16.inl.h"
#include "linear_attention_state.inl.h"

#include "linear_attention_forward.inl.h"

#include "linear_attention_backward.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace linear_attention_impl {

template <bool backward>
int64_t workspace(const Params& p) {
  return Plan(p, backward).workspace;
}

template <bool backward, int phase>
int64_t units(const Params& p) {
  const Plan plan(p, backward);
  const int64_t all = p.N * plan.groups * plan.splits;
  if (plan.whole) return phase == 0 ? all : 0;
  if (backward && phase < 2 && !p.causal) return 0;
  return sums_states(phase) ? p.N * p.H : all;
}

template <bool backward, int phase>
void run(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Plan plan(p, backward);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (backward) {
      run_pass<Backward<T>>(p, plan, phase, workspace, begin, end);
    } else {
      run_pass<Forward<T>>(p, plan, phase, workspace, begin, end);
    }
  });
}

template <bool backward, int phase>
constexpr Step<Params> step() {
  return {units<backward, phase>, run<backward, phase>};
}
constexpr Step<Params> kForward[] = {step<false, 0>(), step<false, 1>(), step<false, 2>()};
constexpr Step<Params> kBackward[] = {step<true, 0>(), step<true, 1>(), step<true, 2>(), step<true, 3>(),
                                      step<true, 4>()};

}  // namespace linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<LinearAttentionParams>* EFFVIT_KERNEL_NAME(linear_attention)() {
  namespace impl = EFFVIT_ISA_NAME::linear_attention_impl;
  static constexpr Kernel<LinearAttentionParams> kernel = {routine(impl::kForward, impl::workspace<false>),
                                                           routine(impl::kBackward, impl::workspace<true>)};
  return &kernel;
}
}  // namespace effvit::cpu
