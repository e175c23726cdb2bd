// Gated linear attention: what chunks add to the state, the walk over chunks, sums of gradients of gates. See
// gated_linear_attention.cuh.
#pragma once
#include "gated_linear_attention_common.cuh"

namespace effvit {
namespace cuda {
namespace gated_linear_attention_impl {

template <class T>
struct StateLayout {
  static constexpr int kX = 0, kY = kX + bytes_of<T>(kChunk, kBlockK), kTotals = kY + bytes_of<T>(kChunk, kBlockV);
  static constexpr int kBytes = kTotals + kSubs * kBlockK * 4;
};

// The sum over a chunk's tokens of (x e^G)^T y, G the gates that follow a token; and e to the sum of all.
template <class T>
EFFVIT_KERNEL(kThreads, 4)
gated_linear_attention_state_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  using Layout = StateLayout<T>;
  const auto x = tile_at<T>(Layout::kX, kChunk, kBlockK), y = tile_at<T>(Layout::kY, kChunk, kBlockV);
  const Shared<float> totals(Layout::kTotals, kSubs * kBlockK);
  const int own = prim::warp_id(), lane = prim::lane_id();
  const int K = static_cast<int>(g.p.K), V = static_cast<int>(g.p.V);
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    int64_t i = id;
    const int first_v = static_cast<int>(take_index(i, g.v_blocks)) * kBlockV;
    const int first_k = static_cast<int>(take_index(i, g.k_blocks)) * kBlockK;
    const int64_t head = take_index(i, g.p.H);
    const Work work = work_at(g, i, head);
    if (work.count == 0) continue;
    prim::sync_threads();  // the previous piece of work
    const Gates gates(g, work, first_k + lane, totals);
    load_values<T>(y, g.y, work, first_v);
    float column[kSub];
    load_column<T>(g.x, work, first_k + lane, column);
    prim::sync_threads();  // totals
    float sum = gates.behind();
    EFFVIT_UNROLL
    for (int r = kSub - 1; r >= 0; --r) {
      sum += gates.gate[r];
      store_one(x, (own * kSub + r) * x.stride + lane, column[r] * g.x_scale * prim::exp(sum));
    }
    if (g.decays != nullptr && own == 0 && first_v == 0 && first_k + lane < K)
      prim::store_global(g.decays + work.place * K + first_k + lane, prim::exp(gates.entry + sum));
    prim::sync_threads();  // the tiles are complete
    float state[kBlockK / 8][4];  // of the transpose: the rows are columns of y
    clear(state);
    product<kDepthFirst, kDepthFirst>(state, kBlockK / 8, y.at(0, warp_row()), x.at(0, 0), kChunk);
    float* const to = g.states + work.place * K * V;
    for_each_acc<kBlockK / 8>(kBlockK / 8, [&](int n, int e) {
      const int row = first_k + n * 8 + acc_col() + e % 2, col = first_v + acc_row() + e / 2 * 8;
      if (row < K && col < V) prim::store_global(to + static_cast<int64_t>(row) * V + col, state[n][e]);
    });
  }
}

// In every chunk's slot, what the chunk adds to the state makes way for the state that meets the chunk.
template <class Index>
EFFVIT_KERNEL(kThreads, 8)
gated_linear_attention_scan_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  constexpr int kAhead = 4;  // chunks whose numbers are on their way
  const Index each = g.p.K * g.p.V, all = g.p.N * g.p.H * each, stride = g.p.H * each, decay_stride = g.p.H * g.p.K;
  EFFVIT_NO_UNROLL
  for (Index i = prim::cta_id() * kThreads + prim::thread_id(); i < all; i += prim::cta_count() * kThreads) {
    const Index block = i / each, element = i - block * each, n = block / g.p.H, head = block - n * g.p.H;
    const Sequence s = sequence_at(g, n);
    const Index first = (s.slot * g.p.H + head) * each + element;
    const Index first_decay = (s.slot * g.p.H + head) * g.p.K + element / g.p.V;
    float state = g.initial == nullptr ? 0.f : prim::load_global(g.initial + i);
    EFFVIT_NO_UNROLL
    for (Index c = 0; c < s.chunks; c += kAhead) {
      float added[kAhead], decay[kAhead];
      EFFVIT_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        const Index at = g.step > 0 ? c + a : s.chunks - 1 - c - a;
        const bool inside = c + a < s.chunks;
        added[a] = inside ? prim::load_global(g.states + first + at * stride) : 0.f;
        decay[a] = inside ? prim::load_global(g.decays + first_decay + at * decay_stride) : 1.f;
      }
      EFFVIT_UNROLL
      for (int a = 0; a < kAhead; ++a) {
        const Index at = g.step > 0 ? c + a : s.chunks - 1 - c - a;
        if (c + a < s.chunks) {
          prim::store_global(g.states + first + at * stride, state);
          state = state * decay[a] + added[a];
        }
      }
    }
    if (g.total != nullptr) prim::store_global(g.total + i, state);
  }
}

// The gradient of a gate is the sum of `parts` rows of `count` floats.
struct Parts {
  const float* from;
  void* to;
  int64_t parts, count;
  DType type;
};

// A CTA has one element, whose parts its threads share: many parts.
template <class Index>
EFFVIT_KERNEL(kThreads, 8)
gated_linear_attention_sum_kernel(EFFVIT_GRID_CONSTANT Parts s) {
  const Shared<float> sums(0, kWarps);
  EFFVIT_NO_UNROLL
  for (Index i = prim::cta_id(); i < s.count; i += prim::cta_count()) {
    float sum = 0.f;
    for (Index part = prim::thread_id(); part < s.parts; part += kThreads)
      sum += prim::load_global(s.from + part * s.count + i);
    sum = prim::warp_sum(sum);
    prim::sync_threads();  // the previous element's readers
    if (prim::lane_id() == 0) sums.store(prim::warp_id(), sum);
    prim::sync_threads();
    if (prim::thread_id() == 0) {
      float total = 0.f;
      for (int w = 0; w < kWarps; ++w) total += sums.load(w);
      store_small(s.to, i, s.type, total);
    }
  }
}

// A thread has one element: few parts.
template <class Index>
EFFVIT_KERNEL(kThreads, 8)
gated_linear_attention_add_kernel(EFFVIT_GRID_CONSTANT Parts s) {
  EFFVIT_NO_UNROLL
  for (Index i = prim::cta_id() * kThreads + prim::thread_id(); i < s.count; i += prim::cta_count() * kThreads) {
    float sum = 0.f;
    for (Index part = 0; part < s.parts; ++part) sum += prim::load_global(s.from + part * s.count + i);
    store_small(s.to, i, s.type, sum);
  }
}

// Zeros for the tokens that belong to no sequence: `words` 16-bit words a token.
template <class Index>
EFFVIT_KERNEL(kThreads, 8)
gated_linear_attention_fill_kernel(EFFVIT_GRID_CONSTANT GatedLinearAttentionParams p, void* to, Index words) {
  const auto offset = [&](int64_t n) {
    const int32_t at = prim::load_global(p.cu_seqlens + n);
    return gated_range(p, 0, at, at).begin;
  };
  const Index before = offset(0), after = offset(p.N) < before ? before : offset(p.N);
  const Index all = (before + p.L - after) * words;
  EFFVIT_NO_UNROLL
  for (Index i = prim::cta_id() * kThreads + prim::thread_id(); i < all; i += prim::cta_count() * kThreads) {
    const Index token = i / words < before ? i / words : i / words - before + after;
    prim::store_global(static_cast<prim::bfloat16*>(to) + token * words + i % words, prim::bfloat16{0});
  }
}

}  // namespace gated_linear_attention_impl
}  // namespace cuda
}  // namespace effvit
