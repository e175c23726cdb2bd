// gated_linear_attention on the CPU: entry points. On raw pointers, compiled once per ISA.
//
// A unit of work is one head of a sequence, or some values of it, or, of backward, a part of its tokens, walked in
// chunks of 32 or 64 tokens from one end to the other, or, where both directions are summed, twice. A chunk is read
// into float32 scratch in the order of the walk; from there on all is products of matrices (cpu/gemm.h) and decays,
// whose exponents are sums of gates, never positive: between the tokens of a chunk where a token has one gate; where
// every channel has its own, relative to the first token of a block of as many tokens as a vector has lanes, and token
// by token within such a block.
#pragma once

#include "gated_linear_attention_chunk.inl.h"

#include "gated_linear_attention_forward.inl.h"

#include "gated_linear_attention_backward.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace gated_linear_attention_impl {

int64_t forward_units(const Params& p) { return p.N * p.H * Geometry(p).v_blocks; }

void forward(const Params& p, float*, int64_t begin, int64_t end) { run_pass<Forward>(p, Geometry(p), begin, end); }

// What the parts of walks add to states, where they are split; two walks then are steps of their own.
int64_t part_units(const Params& p) {
  const Geometry g(p);
  return g.splits > 1 ? p.N * p.H * walks_of(p) * g.splits : 0;
}

void parts(const Params& p, float* workspace, int64_t begin, int64_t end) {
  run_pass<Parts>(p, Geometry(p), workspace, begin, end);
}

template <int index>
int64_t backward_units(const Params& p) {
  const Geometry g(p);
  return index == 0 || (g.splits > 1 && walks_of(p) > 1) ? p.N * p.H * g.splits : 0;
}

int64_t backward_floats(const Params& p) { return Backward::floats(p, Geometry(p)); }

template <int index>
void backward(const Params& p, float* workspace, int64_t begin, int64_t end) {
  run_pass<Backward>(p, Geometry(p), workspace, index, begin, end);
}

int64_t reduce_units(const Params& p) { return p.gate == GateKind::kHead ? p.H : 0; }

void reduce(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const int64_t units = Backward::units_of_head(p, Geometry(p));
  for (int64_t h = begin; h < end; ++h) {
    double sum = 0.0;
    for (int64_t n = 0; n < p.N; ++n) {
      for (int64_t i = 0; i < units; ++i) sum += workspace[(n * p.H + h) * units + i];
    }
    store_scalar(p.dg, p.gate_dtype, h, static_cast<float>(sum));
  }
}

constexpr Step<Params> kForward[] = {{forward_units, forward}};
constexpr Step<Params> kBackward[] = {
    {part_units, parts}, {backward_units<0>, backward<0>}, {backward_units<1>, backward<1>}, {reduce_units, reduce}};

}  // namespace gated_linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<GatedLinearAttentionParams>* EFFVIT_KERNEL_NAME(gated_linear_attention)() {
  namespace impl = EFFVIT_ISA_NAME::gated_linear_attention_impl;
  static constexpr Kernel<GatedLinearAttentionParams> kernel = {routine(impl::kForward),
                                                                routine(impl::kBackward, impl::backward_floats)};
  return &kernel;
}
}  // namespace effvit::cpu
