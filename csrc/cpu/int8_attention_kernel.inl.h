// int8_attention on the CPU: forward, on raw pointers, compiled once per ISA. Keys and values of all heads are
// quantised into the workspace first; then blocks of queries run over them. A few queries run over rows of bytes
// instead.
#pragma once

#include "int8_attention_pack.inl.h"
#include "int8_attention_weights.inl.h"
#include "int8_attention_lanes.inl.h"
#include "int8_attention_rows.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace int8_attention_impl {

// Rows of a unit of work.
int64_t rows_of_unit(const Plan& plan) {
  if (plan.few) return plan.rows;
  return plan.rows <= kLanes || small_tiles() ? kLanes : 2 * kLanes;
}
int64_t units(const Params& p) {
  const Plan plan(p);
  return p.B * p.G * ceil_div(plan.rows, rows_of_unit(plan));
}

template <class Pass, class... Rows>
void run_head(const Params& p, const Plan& plan, const Head& head, int64_t b, int64_t g, Rows... rows) {
  Scratch count;
  Pass sizes(p, plan, count);
  Scratch scratch(static_cast<char*>(thread_scratch(static_cast<size_t>(count.used()))));
  Pass pass(p, plan, scratch);
  pass.run(head, b, g, rows...);
}

// The queries of a unit lie far apart: they are fetched while the unit before is computed.
void fetch_queries(const Params& p, int64_t b, int64_t g, int64_t first, int rows) {
  const int64_t bytes = element_bytes(p.dtype), heads = p.H / p.G;
  for (int64_t r = first; r < first + rows; ++r) {
    const char* const row = static_cast<const char*>(p.q) + bytes * (b * p.q_stride_b + r / heads * p.q_stride_l +
                                                                     (g * heads + r % heads) * p.q_stride_h);
    for (int64_t at = 0; at < p.K * bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

void run(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Plan plan(p);
#if defined(EFFVIT_HAS_INT8_DOT) && defined(EFFVIT_HAS_TILES)
  const TileScope scope;
#endif
  const int64_t unit_rows = rows_of_unit(plan), blocks = ceil_div(plan.rows, unit_rows);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % blocks * unit_rows, g = unit / blocks % p.G, b = unit / blocks / p.G;
    const int rows = static_cast<int>(std::min(unit_rows, plan.rows - first));
    const Head head(plan, p, workspace, b, g);
    if (unit + 1 < end) {
      const int64_t next = unit + 1, from = next % blocks * unit_rows;
      fetch_queries(p, next / blocks / p.G, next / blocks % p.G, from,
                    static_cast<int>(std::min(unit_rows, plan.rows - from)));
    }
    if (plan.few)
      run_head<RowPass>(p, plan, head, b, g);
    else if (rows <= kLanes)
      run_head<LanePass<1>>(p, plan, head, b, g, first, rows);
    else
      run_head<LanePass<2>>(p, plan, head, b, g, first, rows);
  }
}

constexpr Step<Params> kForward[] = {{mean_units, run_means}, {pack_units, run_pack}, {units, run}};

}  // namespace int8_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<Int8AttentionParams>* EFFVIT_KERNEL_NAME(int8_attention)() {
  namespace impl = EFFVIT_ISA_NAME::int8_attention_impl;
  static constexpr Kernel<Int8AttentionParams> kernel = {routine(impl::kForward, impl::workspace), {}};
  return &kernel;
}
}  // namespace effvit::cpu
