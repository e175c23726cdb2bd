// Forward pass of window attention. See window_attention.cuh.
#pragma once
#include "window_attention_common.cuh"

namespace effvit {
namespace cuda {
namespace window_attention_impl {

// The softmax of rows that arrive tile by tile, for this lane's two rows.
struct OnlineSoftmax {
  float row_max[2] = {-infinity(), -infinity()}, row_sum[2] = {0.f, 0.f};

  // Turns logits into exponentials, relative to the largest logit so far; what was summed up before is to be multiplied
  // by `rescale`.
  EFFVIT_DEVICE void add(float (&s)[kTiles][4], float (&rescale)[2]) {
    float tile_max[2] = {row_max[0], row_max[1]}, offset[2];
    for_each_acc<kTiles>(
        kTiles, [&](int n, int e) { tile_max[e / 2] = tile_max[e / 2] > s[n][e] ? tile_max[e / 2] : s[n][e]; });
    EFFVIT_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float m = prim::warp_max<4>(tile_max[r]);
      offset[r] = m == -infinity() ? 0.f : m;  // no key of this row so far
      rescale[r] = prim::exp2((row_max[r] - offset[r]) * kLog2e);
      row_max[r] = m;
      row_sum[r] *= rescale[r];
    }
    for_each_acc<kTiles>(kTiles, [&](int n, int e) {
      s[n][e] = prim::exp2((s[n][e] - offset[e / 2]) * kLog2e);
      row_sum[e / 2] += s[n][e];
    });
  }
};

template <class T, int kCols, bool kInShared>
EFFVIT_KERNEL(kThreads, 2)
window_attention_fwd_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  constexpr int kOutTiles = kCols / 8;
  const Position at = cta_position(g, g.q_tiles, 1);
  const Cta<T, kInShared> c(g, at.head);
  const Tile<Native<T>> out_stage(g.s_q, kTile, kCols);  // over q, which is no longer needed
  const int first_col = at.chunk * kCols, cols = min_of(kCols, g.dv_pad - first_col);
  load_table(c);

  EFFVIT_NO_UNROLL
  for (int64_t tile = at.walk; tile < g.tiles; tile += g.walks) {
    prim::sync_threads();  // the previous tile's readers
    place_tokens(c, tile, at.q_tile, 0, true);
    prim::sync_threads();
    if (c.cosine) query_norms(c);

    float o[kOutTiles][4];
    OnlineSoftmax softmax;
    clear(o);
    EFFVIT_NO_UNROLL
    for (int kt = 0; kt < g.k_tiles; ++kt) {
      if (kt > 0) {
        prim::sync_threads();
        place_tokens(c, tile, at.q_tile, kt, false);
        prim::sync_threads();
      }
      if (c.cosine) {
        key_norms(c);
        prim::sync_threads();
      }
      if (c.resident()) {
        if (kt == 0) load_operand(c, kQ, 0, g.d_pad);
        load_operand(c, kK, 0, g.d_pad);
      }
      prim::cp_async_commit();
      load_operand(c, kV, first_col, cols);
      prim::cp_async_commit();
      prim::cp_async_wait<1>();
      prim::sync_threads();

      const int n_tiles = tile_length(g.keys, kt, 8) / 8;
      float s[kTiles][4], rescale[2];
      query_times_key(c, s, n_tiles);
      const int q_meta[2] = {c.q_token.load(c.row).v[3], c.q_token.load(c.row + 8).v[3]};
      EFFVIT_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        Vec<int, 2> meta = {};
        if (n < n_tiles) meta = c.k_meta.template load_vec<Vec<int, 2>>(c.key_base + n * 8 + c.column);
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e)
          s[n][e] = n < n_tiles ? logit(c, s[n][e], q_meta[e / 2], meta.v[e % 2]) : -infinity();
      }
      softmax.add(s, rescale);
      for_each_acc<kOutTiles>(kOutTiles, [&](int n, int e) { o[n][e] *= rescale[e / 2]; });
      prim::cp_async_wait<0>();
      prim::sync_threads();
      const int depth = tile_length(g.keys, kt, Traits<T>::kStepK);
      score_product(o, cols / 8, s, c.v.at(c.key_base, 0), depth, c.p);
    }

    EFFVIT_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float sum = prim::warp_sum<4>(softmax.row_sum[r]), inverse = 1.f / sum;
      EFFVIT_UNROLL
      for (int n = 0; n < kOutTiles; ++n) o[n][2 * r] *= inverse, o[n][2 * r + 1] *= inverse;
      const Int4 token = c.q_token.load(c.row + 8 * r);
      if (at.chunk == 0 && c.column == 0 && token.v[1] >= 0)
        prim::store_global(g.p.lse + lse_index(g, c.head, token), softmax.row_max[r] + prim::log(sum));
    }
    store_acc(out_stage, 0, o, kOutTiles);
    prim::sync_warp();
    const MapGradient out = {g.p.out, g.p.h * g.p.dv, g.out.cols, g.out.vec};
    store_tokens(c, out_stage, c.q_token, out, first_col, kCols);
  }
}

}  // namespace window_attention_impl
}  // namespace cuda
}  // namespace effvit
