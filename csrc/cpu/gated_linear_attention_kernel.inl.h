// gated_linear_attention on the CPU: entry points. On raw pointers, compiled once per ISA.
//
// A unit of work is one head of a sequence, walked in chunks of 64 tokens from one end to the other, or, where both
// directions are summed, twice. A chunk is read into float32 scratch in the order of the walk; from there on all is
// products of matrices (cpu/gemm.h) and decays, whose exponents are sums of gates, never positive: between the tokens
// of a chunk where a token has one gate; where every channel has its own, relative to the first token of a block of as
// many tokens as a vector has lanes, and token by token within such a block.
#pragma once

#include "gated_linear_attention_chunk.inl.h"

#include "gated_linear_attention_forward.inl.h"

#include "gated_linear_attention_backward.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace gated_linear_attention_impl {

int64_t forward_units(const Params& p) { return p.N * p.H * Geometry(p).v_blocks; }

void forward(const Params& p, float*, int64_t begin, int64_t end) { run_pass<Forward>(p, Geometry(p), begin, end); }

int64_t backward_units(const Params& p) { return p.N * p.H; }

// The sum over a sequence's tokens of the gradient of a head's gate.
int64_t head_sums(const Params& p) { return p.gate == GateKind::kHead ? p.N * p.H : 0; }

void backward(const Params& p, float* head_sums, int64_t begin, int64_t end) {
  run_pass<Backward>(p, Geometry(p), head_sums, begin, end);
}

int64_t reduce_units(const Params& p) { return p.gate == GateKind::kHead ? p.H : 0; }

void reduce(const Params& p, float* head_sums, int64_t begin, int64_t end) {
  for (int64_t h = begin; h < end; ++h) {
    double sum = 0.0;
    for (int64_t n = 0; n < p.N; ++n) sum += head_sums[n * p.H + h];
    store_scalar(p.dg, p.gate_dtype, h, static_cast<float>(sum));
  }
}

constexpr Step<Params> kForward[] = {{forward_units, forward}};
constexpr Step<Params> kBackward[] = {{backward_units, backward}, {reduce_units, reduce}};

}  // namespace gated_linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<GatedLinearAttentionParams>* EFFVIT_KERNEL_NAME(gated_linear_attention)() {
  namespace impl = EFFVIT_ISA_NAME::gated_linear_attention_impl;
  static constexpr Kernel<GatedLinearAttentionParams> kernel = {routine(impl::kForward),
                                                                routine(impl::kBackward, impl::head_sums)};
  return &kernel;
}
}  // namespace effvit::cpu
