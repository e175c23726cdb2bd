// window_attention on the CPU: entry points. On raw pointers, compiled once per ISA.
//
// A unit of work is one (window, head). Its tokens are found by index arithmetic and packed into scratch, K transposed
// (that is the layout the row-times-matrix products want). A block of query rows then goes through logits, softmax and
// P·V without leaving the L1 cache. Windows of more tokens than a tile are cut into tiles with an online softmax, so
// the scratch of a thread stays below 2 MiB at any size.
//
// Logits are kept in units of ln 2, so that a probability is one exp2: log2(e) goes into the factor of q, the bias and
// the mask. Gradients of logits are natural.
#pragma once

#include "window_attention_tokens.inl.h"

#include "window_attention_bias.inl.h"
#include "window_attention_pass.inl.h"

#include "window_attention_backward.inl.h"
#include "window_attention_forward.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace window_attention_impl {

int64_t forward_units(const Params& p) {
  const Geometry g(p);
  return p.B * g.windows * p.h;
}

void forward(const Params& p, float*, int64_t begin, int64_t end) {
  const Geometry g(p);
  dispatch_dtype(p.dtype, [&](auto type) { run_pass<Forward<decltype(type)>>(p, g, begin, end); });
}

int64_t backward_units(const Params& p) {
  const Geometry g(p);
  const Partials layout(p, g);
  return layout.chunks * layout.groups;
}

int64_t backward_partials(const Params& p) {
  const Geometry g(p);
  const Partials layout(p, g);
  return layout.chunks * p.h * layout.stride;
}

void backward(const Params& p, float* partials, int64_t begin, int64_t end) {
  const Geometry g(p);
  dispatch_dtype(p.dtype, [&](auto type) { run_pass<Backward<decltype(type)>>(p, g, partials, begin, end); });
}

int64_t reduce_units(const Params&) { return 1; }

void reduce_partials(const Params& p, float* partials, int64_t, int64_t) {
  const Geometry g(p);
  dispatch_dtype(p.dtype, [&](auto type) { reduce<decltype(type)>(p, g, partials); });
}

constexpr Step<Params> kForward[] = {{forward_units, forward}};
constexpr Step<Params> kBackward[] = {{backward_units, backward}, {reduce_units, reduce_partials}};

}  // namespace window_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<WindowAttentionParams>* EFFVIT_KERNEL_NAME(window_attention)() {
  namespace impl = EFFVIT_ISA_NAME::window_attention_impl;
  static constexpr Kernel<WindowAttentionParams> kernel = {routine(impl::kForward),
                                                           routine(impl::kBackward, impl::backward_partials)};
  return &kernel;
}
}  // namespace effvit::cpu
