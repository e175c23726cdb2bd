// Gated linear attention: queries times the state, and what the tokens of a chunk see of each other. See
// gated_linear_attention.cuh.
#pragma once
#include "gated_linear_attention_common.cuh"

namespace effvit {
namespace cuda {
namespace gated_linear_attention_impl {

template <class T>
struct OutputLayout {
  static constexpr int kNear = 0, kFar = kNear + bytes_of<T>(kChunk, kBlockK);
  static constexpr int kKeys = kFar + bytes_of<T>(kChunk, kBlockK);
  static constexpr int kState = kKeys + bytes_of<T>(kKeyRows, kBlockK);
  static constexpr int kValues = kState + bytes_of<T>(kBlockK, kBlockV);
  static constexpr int kTotals = kValues + bytes_of<T>(kChunk, kBlockV);
  static constexpr int kOwn = kTotals + kSubs * kBlockK * 4;  // [kSubs, kSub, kSub + 1]: scores within sub-chunks
  static constexpr int kBytes = kOwn + kSubs * kSub * (kSub + 1) * 4;
  static constexpr int kScores = kNear;  // float32's, when near and far are done with
  static_assert(kTensorCores<T> || bytes_of<T>(kChunk, kChunk) <= kKeys, "scores take the place of near and far");
};

// A CTA owns the tokens of a chunk and kBlockV columns of the result.
template <class T>
EFFVIT_KERNEL(kThreads, 2)
gated_linear_attention_out_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  using Layout = OutputLayout<T>;
  // Queries, referred to the sub-chunk's first token and to the chunk's beginning.
  const auto near = tile_at<T>(Layout::kNear, kChunk, kBlockK), far = tile_at<T>(Layout::kFar, kChunk, kBlockK);
  const auto keys = tile_at<T>(Layout::kKeys, kKeyRows, kBlockK);
  const auto state = tile_at<T>(Layout::kState, kBlockK, kBlockV);
  const auto values = tile_at<T>(Layout::kValues, kChunk, kBlockV);
  const Shared<float> totals(Layout::kTotals, kSubs * kBlockK), pairs(Layout::kOwn, kSubs * kSub * (kSub + 1));
  Tile<Wide<T>> scores_tile;
  if constexpr (!kTensorCores<T>) scores_tile = tile_at<T>(Layout::kScores, kChunk, kChunk);
  const int own = prim::warp_id(), lane = prim::lane_id(), pairs_at = own * kSub * (kSub + 1);
  const int V = static_cast<int>(g.p.V);
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    int64_t index = id;
    const int first_v = static_cast<int>(take_index(index, g.v_blocks)) * kBlockV;
    const int64_t head = take_index(index, g.p.H);
    const Work work = work_at(g, index, head);
    if (work.count == 0) continue;
    const int v_tiles = column_tiles(V - first_v);
    float out[kTiles][4], p[kTiles][4], of_row[kSub] = {};  // of_row: a lane's scores, row lane % kSub of the sub-chunk
    clear(out);
    clear(p);
    EFFVIT_NO_UNROLL
    for (int block = 0; block < g.k_blocks; ++block) {
      const int channel = block * kBlockK + lane;
      prim::sync_threads();  // the tiles' previous readers
      Gates gates(g, work, channel, totals);
      if (block == 0) load_values<T>(values, g.values, work, first_v);
      load_state<T>(g, state, g.states, work, block * kBlockK, first_v, [](int, float, float) {});
      float q[kSub], k[kSub];
      load_column<T>(g.x, work, channel, q);
      load_column<T>(g.y, work, channel, k);
      prim::sync_threads();  // totals
      const float before = gates.before();
      float sum = 0.f;
      EFFVIT_UNROLL
      for (int r = 0; r < kSub; ++r) {
        const int at = (own * kSub + r) * near.stride + lane;
        store_one(near, at, q[r] * prim::exp(sum));
        store_one(far, at, q[r] * g.x_scale * prim::exp(before + sum));
        sum += gates.gate[r];
      }
      store_keys<T>(keys, gates, k);
      exponentiate(gates.gate);
      EFFVIT_UNROLL
      for (int j = 0; j < kSub; ++j) {
        float of_key[kSub], decayed = k[j];
        EFFVIT_UNROLL
        for (int i = 0; i < kSub; ++i) {
          of_key[i] = i < j ? 0.f : q[i] * decayed;
          if (i >= j) decayed *= gates.gate[i];
        }
        of_row[j] += sum_transposed(of_key);
      }
      prim::sync_threads();  // the tiles are complete
      product<kDepthLast, kDepthLast>(p, own * kSub / 8, near.at(warp_row(), 0), keys.at(key_row(own), 0), kBlockK);
      product<kDepthLast, kDepthFirst>(out, v_tiles, far.at(warp_row(), 0), state.at(0, 0), kBlockK);
    }
    prim::sync_threads();  // the readers of near and far, whose place scores take
    if (lane < kSub) {
      EFFVIT_UNROLL
      for (int j = 0; j < kSub; ++j) pairs.store(pairs_at + lane * (kSub + 1) + j, of_row[j]);
    }
    prim::sync_warp();
    const float scale = g.x_scale * g.y_scale;
    for_each_acc<kTiles>(kTiles, [&](int n, int e) {
      const int i = acc_row() - warp_row() + e / 2 * 8, j = n * 8 + acc_col() + e % 2 - warp_row();
      if (j >= 0) p[n][e] = j < i + (g.strict ? 0 : 1) ? pairs.load(pairs_at + i * (kSub + 1) + j) : 0.f;
      p[n][e] *= scale;
    });
    score_product<Wide<T>>(out, v_tiles, p, values.at(0, 0), (own + 1) * kSub, scores_tile);
    for_each_acc<kTiles>(v_tiles, [&](int n, int e) {
      const int position = acc_row() + e / 2 * 8, col = first_v + n * 8 + acc_col() + e % 2;
      if (position >= work.count || col >= V) return;
      const int64_t element = ((work.batch * g.p.L + work.token(position)) * g.p.H + work.head) * V + col;
      const float prior = g.prior == nullptr ? 0.f : prim::load_global(g.prior + element);
      store_small(g.to, element, g.to_type, out[n][e] + prior);
    });
  }
}

}  // namespace gated_linear_attention_impl
}  // namespace cuda
}  // namespace effvit
