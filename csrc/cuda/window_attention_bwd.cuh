// Backward passes of window attention. See window_attention.cuh.
#pragma once
#include "window_attention_common.cuh"

namespace effvit {
namespace cuda {
namespace window_attention_impl {

// ---- the gradient of the scores ----

// lse and delta = sum(grad_out out) - grad_lse of every query. +inf makes P = 0 where there is no query.
template <class T, bool kInShared>
EFFVIT_DEVICE void row_statistics(const Cta<T, kInShared>& c) {
  const auto& p = c.g.p;
  const int row = prim::thread_id() / 2;
  const Int4 token = c.q_token.load(row);
  const float dot = row_dot(token_row<T>(c.g.grad, c.head, token), token_row<T>(c.g.out, c.head, token));
  if (prim::thread_id() % 2 != 0) return;
  float lse = infinity(), delta = 0.f;
  if (token.v[1] >= 0) {
    const int64_t at = lse_index(c.g, c.head, token);
    lse = prim::load_global(static_cast<const float*>(p.lse) + at);
    delta = dot - (p.grad_lse == nullptr ? 0.f : prim::load_global(p.grad_lse + at));
  }
  c.row_lse.store(row, lse);
  c.row_delta.store(row, delta);
}

// Sums over the keys of this lane's two rows; complete after a sum over the four lanes of a row.
struct RowSums {
  float dot[2] = {0.f, 0.f};  // dS s
  float p_outside[2] = {0.f, 0.f};  // over keys outside the map: P,
  float ds_outside[2] = {0.f, 0.f};  // dS
  float dot_outside[2] = {0.f, 0.f};  // and dS s
};

// Per key of the tile the sum over queries of dS s: one row of column_dot per warp, in which the first four lanes own
// their columns.
template <class T, bool kInShared>
EFFVIT_DEVICE void clear_column_dot(const Cta<T, kInShared>& c) {
  if (!c.cosine) return;
  const int base = prim::warp_id() * kTile;
  c.column_dot.store(base + c.lane, 0.f);
  c.column_dot.store(base + c.lane + prim::kWarpSize, 0.f);
  prim::sync_warp();
}
template <class T, bool kInShared>
EFFVIT_DEVICE void add_column_dot(const Cta<T, kInShared>& c, int n, float even, float odd) {
  const float x[2] = {even, odd};
  const int i = prim::warp_id() * kTile + c.key_base + n * 8 + c.column;
  EFFVIT_UNROLL
  for (int e = 0; e < 2; ++e) {
    float sum = x[e];
    EFFVIT_UNROLL
    for (int m = 4; m < prim::kWarpSize; m *= 2) sum += prim::shuffle_xor(sum, m);
    if (c.lane < 4) c.column_dot.store(i + e, c.column_dot.load(i + e) + sum);
  }
}
template <class T, bool kInShared>
EFFVIT_DEVICE float column_dot(const Cta<T, kInShared>& c, int row) {
  float sum = 0.f;
  if (!c.cosine) return sum;
  for (int w = 0; w < kWarps; ++w) sum += c.column_dot.load(w * kTile + row);
  return sum;
}

// s = P and dp = dS of this warp's rows.
template <bool kColumnDot, class T, bool kInShared>
EFFVIT_DEVICE void score_gradients(const Cta<T, kInShared>& c, float (&s)[kTiles][4], float (&dp)[kTiles][4],
                                   RowSums& sums, int n_tiles) {
  query_times_key(c, s, n_tiles);
  clear(dp);
  for_each_streamed(c.g.dv_pad, c.g.dv_cols, [&](int first, int cols) {
    stream_operand(c, kGrad, first, cols);
    stream_operand(c, kV, first, cols);
    product<kDepthLast, kDepthLast>(dp, n_tiles, c.grad.at(c.warp_row, 0), c.v.at(c.key_base, 0), cols);
  });
  const int q_meta[2] = {c.q_token.load(c.row).v[3], c.q_token.load(c.row + 8).v[3]};
  const float lse[2] = {c.row_lse.load(c.row), c.row_lse.load(c.row + 8)};
  const float delta[2] = {c.row_delta.load(c.row), c.row_delta.load(c.row + 8)};
  const bool pads = c.g.p.pad_k != nullptr;
  EFFVIT_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    if (n < n_tiles) {
      const auto meta = c.k_meta.template load_vec<Vec<int, 2>>(c.key_base + n * 8 + c.column);
      float dot[4];
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2;
        const float raw = s[n][e];
        const float p = prim::exp2((logit(c, raw, q_meta[r], meta.v[e % 2]) - lse[r]) * kLog2e);
        const float ds = p * (dp[n][e] - delta[r]);
        s[n][e] = p;
        dp[n][e] = ds;
        dot[e] = ds * raw;
        sums.dot[r] += dot[e];
        if (pads && (meta.v[e % 2] & kOutside) != 0) {
          sums.p_outside[r] += p;
          sums.ds_outside[r] += ds;
          sums.dot_outside[r] += dot[e];
        }
      }
      if constexpr (kColumnDot) {
        if (c.cosine) add_column_dot(c, n, dot[0] + dot[2], dot[1] + dot[3]);
      }
    }
  }
}

// This warp's 16 rows of P or dS: also the columns without keys, which are zero, for a product may read them.
template <class T, bool kInShared>
EFFVIT_DEVICE void store_scores(const Cta<T, kInShared>& c, const Tile<Native<T>>& to, const float (&x)[kTiles][4]) {
  store_acc(to, c.key_base, x, c.g.slot_rows / 8);
}

// Normalises the rows of a resident operand where they lie. The scores are computed before, from the rows as they are:
// rounding a unit vector would be multiplied by the scale, up to 100.
template <class T, bool kInShared>
EFFVIT_DEVICE void normalise_rows(const Cta<T, kInShared>& c, const Tile<Native<T>>& x, const Shared<float>& norm) {
  if (!c.resident()) return;
  const int row = prim::thread_id() / 2;
  const float r = magnitude(norm.load(row));
  EFFVIT_NO_UNROLL
  for (int col = prim::thread_id() % 2 * kVec<T>; col < c.g.d_pad; col += 2 * kVec<T>) {
    auto y = x.hi.template load_vec<Piece<T>>(row * x.stride + col);
    EFFVIT_UNROLL
    for (int e = 0; e < kVec<T>; ++e) y.v[e] = prim::from_float<T>(prim::to_float(y.v[e]) * r);
    x.hi.store_vec(row * x.stride + col, y);
  }
}

// ---- gradients of tokens ----

// The derivative of x / |x|, for this lane's rows: dx = |norm| (y - unit x * dot) with dot = sum over the other side of
// dS s, and without dot where norm < 0.
template <class T>
struct Projection {
  float norm[2], dot[2];
  Tile<Native<T>> x;  // rows as they are; with `unit` normalised
  bool unit;

  template <class C>
  EFFVIT_DEVICE Projection(const C& c, const Shared<float>& norms, float dot0, float dot1, const Tile<Native<T>>& rows,
                           bool are_unit)
      : norm{c.cosine ? norms.load(c.row) : 0.f, c.cosine ? norms.load(c.row + 8) : 0.f},
        dot{dot0, dot1},
        x(rows),
        unit(are_unit) {}
};

// Columns [col, col + kOutCols) of dq, dk or dv, rows of this warp, from tile `first` of the accumulators on: scaled,
// for normalised rows projected (x's columns from x_col on), and written.
template <class T, bool kInShared, int kN>
EFFVIT_DEVICE void store_gradient(const Cta<T, kInShared>& c, const float (&acc)[kN][4], int first, float scale,
                                  const MapGradient& to, const Shared<Int4>& tokens, int col,
                                  const Projection<T>* projection = nullptr, int x_col = 0) {
  const int cols = min_of(kOutCols, to.cols - col);
  prim::sync_warp();  // the previous block's readers
  for_each_pair<kOutCols / 8>(kOutCols / 8, [&](int n, int r, int row, int at) {
    float y[2];
    EFFVIT_UNROLL
    for (int e = 0; e < 2; ++e) {
      y[e] = acc[first + n][2 * r + e] * scale;
      if (projection != nullptr && c.cosine && at < cols) {
        const Tile<Native<T>>& x = projection->x;
        const float norm = projection->norm[r];
        const float v = prim::to_float(x.hi.load(row * x.stride + x_col + at + e)) * (projection->unit ? 1.f : norm);
        y[e] = norm < 0.f ? -norm * y[e] : norm * (y[e] - v * projection->dot[r] * scale);
      }
    }
    store_pair(c.stage, row * c.stage.stride + at, y[0], y[1]);
  });
  prim::sync_warp();
  store_tokens(c, c.stage, tokens, to, col, kOutCols);
}

// Adds the P or dS of keys outside the map times grad_out or q to the CTA's sums; a thread owns its columns.
template <class T>
EFFVIT_DEVICE void add_outside(const Shared<float>& sums, const Shared<float>& weight, const Tile<Native<T>>& x,
                               int cols) {
  for (int col = prim::thread_id(); col < cols; col += kThreads) {
    float sum = sums.load(col);
    EFFVIT_NO_UNROLL
    for (int row = 0; row < kTile; ++row) sum += weight.load(row) * prim::to_float(x.hi.load(row * x.stride + col));
    sums.store(col, sum);
  }
}

// The gradients of pad_k and pad_v need only, per query, the sums of P and dS over the keys outside the map, for all of
// these have the same content.
template <class T, bool kInShared>
EFFVIT_DEVICE void accumulate_outside(const Cta<T, kInShared>& c, RowSums& sums, float& dot_outside) {
  EFFVIT_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float p = prim::warp_sum<4>(sums.p_outside[r]), ds = prim::warp_sum<4>(sums.ds_outside[r]);
    dot_outside += sums.dot_outside[r];
    if (c.column == 0) {
      c.row_p.store(c.row + 8 * r, p);
      c.row_ds.store(c.row + 8 * r, c.cosine ? ds * magnitude(c.q_norm.load(c.row + 8 * r)) : ds);
    }
  }
  prim::sync_threads();
  const Plan& g = c.g;
  const Shared<float> k_sums(g.s_pad, g.d_pad), v_sums(g.s_pad + 4 * g.d_pad, g.dv_pad);
  for_each_streamed(g.d_pad, g.d_cols, [&](int first, int cols) {
    stream_operand(c, kQ, first, cols);
    add_outside(k_sums.from(first), c.row_ds, c.q, cols);
  });
  for_each_streamed(g.dv_pad, g.dv_cols, [&](int first, int cols) {
    stream_operand(c, kGrad, first, cols);
    add_outside(v_sums.from(first), c.row_p, c.grad, cols);
  });
}

template <class T, bool kInShared>
EFFVIT_DEVICE void clear_outside(const Cta<T, kInShared>& c) {
  if (c.g.p.pad_k == nullptr) return;
  const Shared<float> sums(c.g.s_pad, c.g.d_pad + c.g.dv_pad);
  // The owner of a column in add_outside must be the one that clears it, for no barrier lies in between.
  const auto clear_at = [&](int at, int cols) {
    for (int i = prim::thread_id(); i < cols; i += kThreads) sums.store(at + i, 0.f);
  };
  for_each_streamed(c.g.d_pad, c.g.d_cols, [&](int first, int cols) { clear_at(first, cols); });
  for_each_streamed(c.g.dv_pad, c.g.dv_cols, [&](int first, int cols) { clear_at(c.g.d_pad + first, cols); });
}

template <class T, bool kInShared>
EFFVIT_DEVICE float cta_sum(const Cta<T, kInShared>& c, float x) {
  x = prim::warp_sum(x);
  prim::sync_threads();
  if (c.lane == 0) c.reduce.store(prim::warp_id(), x);
  prim::sync_threads();
  float sum = 0.f;
  for (int w = 0; w < kWarps; ++w) sum += c.reduce.load(w);
  return sum;
}

// This CTA's row of partial sums for pad_k, pad_v and logit_scale.
template <class T, bool kInShared>
EFFVIT_DEVICE void store_small_sums(const Cta<T, kInShared>& c, int part, float dot, float dot_outside) {
  const Plan& g = c.g;
  if (g.p.pad_k == nullptr && !c.cosine) return;
  const float sum = cta_sum(c, dot), sum_outside = cta_sum(c, dot_outside);  // their barriers also publish the pad sums
  float* const to = g.small_sums + (static_cast<int64_t>(c.head) * g.small_partials + part) * g.small_stride;
  const int d = static_cast<int>(g.p.d), dv = static_cast<int>(g.p.dv);
  if (g.p.pad_k != nullptr) {
    const Shared<float> sums(g.s_pad, g.d_pad + g.dv_pad);
    for (int i = prim::thread_id(); i < d; i += kThreads) prim::store_global(to + i, sums.load(i));
    for (int i = prim::thread_id(); i < dv; i += kThreads) prim::store_global(to + d + i, sums.load(g.d_pad + i));
  }
  if (prim::thread_id() == 0) {
    prim::store_global(to + d + dv, sum_outside);
    prim::store_global(to + d + dv + 1, sum);
  }
}

// Sorts dS, summed over windows in the accumulator layout, into the table entries this tile position reaches.
template <class T, bool kInShared>
EFFVIT_DEVICE void store_table_partial(const Cta<T, kInShared>& c, const Position& at, const float (&sum)[kTiles][4]) {
  constexpr int kStride = kTile + 1;
  const Plan& g = c.g;
  const Shared<float> all(0, kTile * kStride);  // over everything else
  prim::sync_threads();
  for_each_acc<kTiles>(g.slot_rows / 8, [&](int n, int e) {
    all.store((c.row + e / 2 * 8) * kStride + n * 8 + c.column + e % 2, sum[n][e]);
  });
  prim::sync_threads();
  int first, count;
  table_range(g, at.q_tile, at.k_tile, first, count);
  const int halo_y = g.axis_y.halo, halo_x = g.axis_x.halo, window_w = g.axis_x.window;
  const int key_h = g.axis_y.window + 2 * halo_y;
  const int rows = min_of(kTile, g.queries - at.q_tile * kTile);
  float* const to =
      g.table_partials +
      (((static_cast<int64_t>(c.head) * g.walks + at.walk) * g.q_tiles + at.q_tile) * g.k_tiles + at.k_tile) *
          g.partial_range;
  for (int entry = prim::thread_id(); entry < count; entry += kThreads) {
    const int iy = (first + entry) / g.table_w, ix = first + entry - iy * g.table_w;
    const int dy = iy - (g.axis_y.window - 1 + halo_y), dx = ix - (window_w - 1 + halo_x);  // q - k
    float total = 0.f;
    int y = at.q_tile * kTile / window_w, x = at.q_tile * kTile - y * window_w;
    for (int i = 0; i < rows; ++i) {
      const int ky = y - dy + halo_y, kx = x - dx + halo_x;
      const int j = ky * g.key_w + kx - at.k_tile * kTile;
      if (ky >= 0 && ky < key_h && kx >= 0 && kx < g.key_w && j >= 0 && j < kTile) {
        for (int slot = 0; slot < g.slots; ++slot) total += all.load((slot * g.slot_rows + i) * kStride + j);
      }
      if (++x == window_w) x = 0, ++y;
    }
    prim::store_global(to + entry, total);
  }
}

// ---- the passes ----

// Places and loads the tokens of one tile position, whole. Returns whether a key lies outside the map.
template <class T, bool kInShared>
EFFVIT_DEVICE bool load_position(const Cta<T, kInShared>& c, int64_t tile, int qt, int kt) {
  prim::sync_threads();  // the previous tile's readers
  const bool outside = place_tokens(c, tile, qt, kt, true);
  const bool any_outside = prim::sync_threads_or(outside);
  if (c.cosine) {
    query_norms(c);
    key_norms(c);
    clear_column_dot(c);
    prim::sync_threads();
  }
  if (c.resident()) {
    load_queries(c);
    load_keys(c);
    prim::cp_async_commit();
  }
  row_statistics(c);
  prim::cp_async_wait<0>();
  prim::sync_threads();
  return any_outside;
}

// Windows of up to 64 tokens without halo: all gradients in one pass.
template <class T, bool kInShared>
EFFVIT_KERNEL(kThreads, 2)
window_attention_bwd_fused_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const Position at = cta_position(g, 1, 1);
  const Cta<T, kInShared> c(g, at.head);
  const int n_tiles = tile_length(g.keys, 0, 8) / 8, depth = tile_length(g.keys, 0, Traits<T>::kStepK);
  const bool with_table = g.p.bias_table != nullptr;
  float ds_sum[kTiles][4], dot = 0.f, dot_outside = 0.f;
  clear(ds_sum);
  load_table(c);
  clear_outside(c);

  EFFVIT_NO_UNROLL
  for (int64_t tile = at.walk; tile < g.tiles; tile += g.walks) {
    const bool any_outside = load_position(c, tile, 0, 0);
    float s[kTiles][4], dp[kTiles][4];
    RowSums sums;
    score_gradients<true>(c, s, dp, sums, n_tiles);
    store_scores(c, c.p, s);
    store_scores(c, c.ds, dp);
    if (with_table) add(ds_sum, dp, n_tiles);
    dot += sums.dot[0] + sums.dot[1];
    const float q_dot[2] = {prim::warp_sum<4>(sums.dot[0]), prim::warp_sum<4>(sums.dot[1])};
    if (g.p.pad_k != nullptr && any_outside) accumulate_outside(c, sums, dot_outside);
    if (c.cosine) {
      prim::sync_threads();  // the readers of the rows as they are
      normalise_rows(c, c.q, c.q_norm);
      normalise_rows(c, c.k, c.k_norm);
    }
    prim::sync_threads();  // P, dS and column_dot of all warps

    const auto p = c.p.at(c.key_base, c.warp_row), ds = c.ds.at(c.key_base, c.warp_row);  // transposed
    const auto ds_rows = c.ds.at(c.warp_row, c.key_base);
    float acc[kOutCols / 8][4];
    for_each_streamed(g.dv_pad, g.dv_cols, [&](int first, int cols) {
      stream_operand(c, kGrad, first, cols);
      EFFVIT_NO_UNROLL
      for (int col = 0; col < cols; col += kOutCols) {
        clear(acc);
        product<kDepthFirst, kDepthFirst>(acc, (cols - col) / 8, p, c.grad.at(c.key_base, col), depth);
        store_gradient(c, acc, 0, 1.f, g.dv, c.k_token, first + col);
      }
    });
    const Projection<T> of_q(c, c.q_norm, q_dot[0], q_dot[1], c.q, true);
    const Projection<T> of_k(c, c.k_norm, column_dot(c, c.row), column_dot(c, c.row + 8), c.k, true);
    for_each_streamed(g.d_pad, g.d_cols, [&](int first, int cols) {
      stream_operand(c, kQ, first, cols, c.cosine);
      stream_operand(c, kK, first, cols, c.cosine);
      EFFVIT_NO_UNROLL
      for (int col = 0; col < cols; col += kOutCols) {
        clear(acc);
        product<kDepthFirst, kDepthFirst>(acc, (cols - col) / 8, ds, c.q.at(c.key_base, col), depth);
        store_gradient(c, acc, 0, c.scale, g.dk, c.k_token, first + col, &of_k, col);
        clear(acc);
        product<kDepthLast, kDepthFirst>(acc, (cols - col) / 8, ds_rows, c.k.at(c.key_base, col), depth);
        store_gradient(c, acc, 0, c.scale, g.dq, c.q_token, first + col, &of_q, col);
      }
    });
  }
  store_small_sums(c, at.walk, dot, dot_outside);
  if (with_table) store_table_partial(c, at, ds_sum);
}

// The columns of a CTA of the passes below, and the streamed piece of an operand that holds them.
struct Chunk {
  int first, piece, in_piece;

  template <class C>
  EFFVIT_DEVICE Chunk(const C& c, int chunk, int cols)
      : first(chunk * cols), piece(c.resident() ? 0 : first / kStreamCols * kStreamCols), in_piece(first - piece) {}
};

// dq, and the sums for pad_k, pad_v and logit_scale: a CTA owns a query tile and kCols columns, and walks the keys.
template <class T, int kCols, bool kInShared>
EFFVIT_KERNEL(kThreads, 2)
window_attention_bwd_dq_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  static_assert(kStreamCols % kCols == 0 && kCols % kOutCols == 0, "a chunk of columns lies in one streamed piece");
  const Position at = cta_position(g, g.q_tiles, 1);
  const Cta<T, kInShared> c(g, at.head);
  const Chunk chunk(c, at.chunk, kCols);
  const int cols = min_of(kCols, g.d_pad - chunk.first), piece_cols = min_of(g.d_cols, g.d_pad - chunk.piece);
  float dot = 0.f, dot_outside = 0.f;
  load_table(c);
  clear_outside(c);

  EFFVIT_NO_UNROLL
  for (int64_t tile = at.walk; tile < g.tiles; tile += g.walks) {
    prim::sync_threads();  // the previous tile's readers
    place_tokens(c, tile, at.q_tile, 0, true);
    prim::sync_threads();
    if (c.cosine) {
      query_norms(c);
      prim::sync_threads();
    }
    if (c.resident()) load_queries(c);
    row_statistics(c);
    float dq[kCols / 8][4];
    clear(dq);
    RowSums sums;
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
      if (c.resident()) load_keys(c);
      prim::cp_async_commit();
      prim::cp_async_wait<0>();
      prim::sync_threads();
      float s[kTiles][4], dp[kTiles][4];
      score_gradients<false>(c, s, dp, sums, tile_length(g.keys, kt, 8) / 8);
      store_scores(c, c.ds, dp);
      prim::sync_warp();
      if (c.cosine) {
        prim::sync_threads();  // the readers of the rows as they are
        normalise_rows(c, c.k, c.k_norm);
        prim::sync_threads();
      }
      stream_operand(c, kK, chunk.piece, piece_cols, c.cosine);
      product<kDepthLast, kDepthFirst>(dq, cols / 8, c.ds.at(c.warp_row, c.key_base),
                                       c.k.at(c.key_base, chunk.in_piece), tile_length(g.keys, kt, Traits<T>::kStepK));
    }
    dot += sums.dot[0] + sums.dot[1];
    const Projection<T> of_q(c, c.q_norm, prim::warp_sum<4>(sums.dot[0]), prim::warp_sum<4>(sums.dot[1]), c.q, false);
    if (c.cosine) stream_operand(c, kQ, chunk.piece, piece_cols);
    EFFVIT_UNROLL
    for (int col = 0; col < kCols; col += kOutCols) {
      if (chunk.first + col < g.dq.cols)
        store_gradient(c, dq, col / 8, c.scale, g.dq, c.q_token, chunk.first + col, &of_q, chunk.in_piece + col);
    }
    if (g.p.pad_k != nullptr && at.chunk == 0) {
      prim::sync_threads();  // the previous tile's readers of row_p and row_ds
      accumulate_outside(c, sums, dot_outside);
    }
  }
  if (at.chunk == 0) store_small_sums(c, at.walk * g.q_tiles + at.q_tile, dot, dot_outside);
}

// The keys of a home window's tile as the query window `by`, `bx` blocks further sees them: out of its halo means
// masked.
template <class T, bool kInShared>
EFFVIT_DEVICE void place_reached_keys(const Cta<T, kInShared>& c, int kt, int by, int bx) {
  const Plan& g = c.g;
  const int row = prim::thread_id();
  if (row >= kTile) return;
  const int j = row % g.slot_rows + kt * kTile;
  const Int4 token = c.k_token.load(row);
  int meta = kInvalid;
  if (token.v[1] != kNowhere) {
    const int y = j / g.axis_x.window;
    const int local_y = y - by * g.axis_y.window, local_x = j - y * g.axis_x.window - bx * g.axis_x.window;
    const bool reached = local_y >= -g.axis_y.halo && local_y < g.axis_y.window + g.axis_y.halo &&
                         local_x >= -g.axis_x.halo && local_x < g.axis_x.window + g.axis_x.halo;
    const int offset = (local_y + g.axis_y.halo) * g.table_w + local_x + g.axis_x.halo;
    if (reached) meta = (offset << kMetaShift) | (key_metadata(g, token) & ((1 << kMetaShift) - 1));
  }
  c.k_meta.store(row, meta);
}

// dk and dv: a CTA owns a key tile without halo and kCols columns of each, and walks the query windows that reach it.
template <class T, int kCols, bool kInShared>
EFFVIT_KERNEL(kThreads, 2)
window_attention_bwd_dkv_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  static_assert(kStreamCols % kCols == 0 && kCols % kOutCols == 0, "a chunk of columns lies in one streamed piece");
  const Position at = cta_position(g, 1, g.q_tiles);  // without halo there are as many key tiles as query tiles
  const Cta<T, kInShared> c(g, at.head);
  const Chunk chunk(c, at.chunk, kCols);
  const int k_cols = min_of(kCols, g.d_pad - chunk.first), v_cols = min_of(kCols, g.dv_pad - chunk.first);
  const int k_piece = min_of(g.d_cols, g.d_pad - chunk.piece), v_piece = min_of(g.dv_cols, g.dv_pad - chunk.piece);
  const int n_tiles = tile_length(g.queries, at.k_tile, 8) / 8;
  const int reach_y = (g.axis_y.halo + g.axis_y.window - 1) / g.axis_y.window;
  const int reach_x = (g.axis_x.halo + g.axis_x.window - 1) / g.axis_x.window;
  const auto p = c.p.at(c.key_base, c.warp_row), ds = c.ds.at(c.key_base, c.warp_row);  // transposed
  load_table(c);

  EFFVIT_NO_UNROLL
  for (int64_t tile = at.walk; tile < g.tiles; tile += g.walks) {
    prim::sync_threads();  // the previous tile's readers
    if (prim::thread_id() < kTile) {
      const int row = prim::thread_id();
      c.k_token.store(row, query_token(g, slot_window(c, tile, row), row % g.slot_rows + at.k_tile * kTile));
    }
    clear_column_dot(c);
    prim::sync_threads();
    if (c.cosine) {
      key_norms(c);
      prim::sync_threads();
    }
    if (c.resident()) load_keys(c);
    float dk[kCols / 8][4], dv[kCols / 8][4];
    clear(dk);
    clear(dv);
    EFFVIT_NO_UNROLL
    for (int by = -reach_y; by <= reach_y; ++by) {
      EFFVIT_NO_UNROLL
      for (int bx = -reach_x; bx <= reach_x; ++bx) {
        EFFVIT_NO_UNROLL
        for (int qt = 0; qt < g.q_tiles; ++qt) {
          prim::sync_threads();  // the previous query tile's readers
          if (qt == 0) place_reached_keys(c, at.k_tile, by, bx);
          if (prim::thread_id() >= kTile) {
            const int row = prim::thread_id() - kTile;
            WindowId w = slot_window(c, tile, row);
            w.y += by * g.axis_y.dilation;
            w.x += bx * g.axis_x.dilation;
            w.valid = w.valid && w.y >= 0 && w.y < g.axis_y.windows && w.x >= 0 && w.x < g.axis_x.windows;
            c.q_token.store(row, query_token(g, w, row % g.slot_rows + qt * kTile));
          }
          prim::sync_threads();
          if (c.cosine) {
            query_norms(c);
            prim::sync_threads();
          }
          if (c.resident()) load_queries(c);
          prim::cp_async_commit();
          row_statistics(c);
          prim::cp_async_wait<0>();
          prim::sync_threads();
          float s[kTiles][4], dp[kTiles][4];
          RowSums sums;
          score_gradients<true>(c, s, dp, sums, n_tiles);
          store_scores(c, c.p, s);
          store_scores(c, c.ds, dp);
          if (c.cosine) {
            prim::sync_threads();  // the readers of the rows as they are
            normalise_rows(c, c.q, c.q_norm);
          }
          prim::sync_threads();
          const int depth = tile_length(g.queries, qt, Traits<T>::kStepK);
          if (v_cols > 0) {
            stream_operand(c, kGrad, chunk.piece, v_piece);
            product<kDepthFirst, kDepthFirst>(dv, v_cols / 8, p, c.grad.at(c.key_base, chunk.in_piece), depth);
          }
          if (k_cols > 0) {
            stream_operand(c, kQ, chunk.piece, k_piece, c.cosine);
            product<kDepthFirst, kDepthFirst>(dk, k_cols / 8, ds, c.q.at(c.key_base, chunk.in_piece), depth);
          }
        }
      }
    }
    const Projection<T> of_k(c, c.k_norm, column_dot(c, c.row), column_dot(c, c.row + 8), c.k, false);
    if (c.cosine && k_cols > 0) stream_operand(c, kK, chunk.piece, k_piece);
    EFFVIT_UNROLL
    for (int col = 0; col < kCols; col += kOutCols) {
      const int to = chunk.first + col;
      if (to < g.dv.cols) store_gradient(c, dv, col / 8, 1.f, g.dv, c.k_token, to);
      if (to < g.dk.cols) store_gradient(c, dk, col / 8, c.scale, g.dk, c.k_token, to, &of_k, chunk.in_piece + col);
    }
  }
}

// The table's partial sums: a CTA owns a query tile and a key tile.
template <class T, bool kInShared>
EFFVIT_KERNEL(kThreads, 2)
window_attention_bwd_table_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const Position at = cta_position(g, g.q_tiles, g.k_tiles);
  const Cta<T, kInShared> c(g, at.head);
  const int n_tiles = tile_length(g.keys, at.k_tile, 8) / 8;
  float ds_sum[kTiles][4];
  clear(ds_sum);
  load_table(c);
  EFFVIT_NO_UNROLL
  for (int64_t tile = at.walk; tile < g.tiles; tile += g.walks) {
    load_position(c, tile, at.q_tile, at.k_tile);
    float s[kTiles][4], dp[kTiles][4];
    RowSums sums;
    score_gradients<false>(c, s, dp, sums, n_tiles);
    add(ds_sum, dp, n_tiles);
  }
  store_table_partial(c, at, ds_sum);
}

// ---- adding up what the CTAs left ----

// dbias_table: 32 entries per CTA; four threads share an entry's partial sums, in a fixed order.
constexpr int kReduceEntries = kThreads / kWarps;
template <class Index>  // a template only so that several translation units may hold it
EFFVIT_KERNEL(kThreads, 2) window_attention_bwd_reduce_table_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const Shared<float> sums(0, kThreads);
  const Index ctas_per_head = ceil_div(g.table_size, kReduceEntries);
  const Index head = prim::cta_id() / ctas_per_head;
  const int entry = static_cast<int>(prim::cta_id() - head * ctas_per_head) * kReduceEntries + prim::lane_id();
  float total = 0.f;
  if (entry < g.table_size) {
    EFFVIT_NO_UNROLL
    for (int qt = 0; qt < g.q_tiles; ++qt) {
      EFFVIT_NO_UNROLL
      for (int kt = 0; kt < g.k_tiles; ++kt) {
        int first, count;
        table_range(g, qt, kt, first, count);
        if (entry < first || entry >= first + count) continue;
        for (int walk = prim::warp_id(); walk < g.walks; walk += kWarps)
          total += prim::load_global(static_cast<const float*>(g.table_partials) +
                                     (((head * g.walks + walk) * g.q_tiles + qt) * g.k_tiles + kt) * g.partial_range +
                                     entry - first);
      }
    }
  }
  sums.store(prim::thread_id(), total);
  prim::sync_threads();
  if (prim::warp_id() != 0 || entry >= g.table_size) return;
  total = 0.f;
  for (int w = 0; w < kWarps; ++w) total += sums.load(w * kReduceEntries + prim::lane_id());
  store_small(g.p.dbias_table, head * g.table_size + entry, g.p.bias_dtype, total);
}

// dpad_k, dpad_v and dlogit_scale: a CTA owns a head.
template <class T>
EFFVIT_KERNEL(kThreads, 2)
window_attention_bwd_reduce_small_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const int head = static_cast<int>(prim::cta_id());
  const int d = static_cast<int>(g.p.d), dv = static_cast<int>(g.p.dv);
  const bool cosine = g.p.logit_scale != nullptr;
  const float scale = head_scale(g, head);
  const float* const from = g.small_sums + static_cast<int64_t>(head) * g.small_partials * g.small_stride;
  const auto total = [&](int column) {
    float sum = 0.f;
    for (int part = 0; part < g.small_partials; ++part)
      sum += prim::load_global(from + static_cast<int64_t>(part) * g.small_stride + column);
    return sum;
  };
  if (g.p.pad_k != nullptr) {
    const T* const pad = static_cast<const T*>(g.p.pad_k) + static_cast<int64_t>(head) * d;
    float squares = 0.f;
    for (int i = prim::lane_id(); i < d; i += prim::kWarpSize) {
      const float x = prim::to_float(prim::load_global(pad + i));
      squares += x * x;
    }
    const float norm = prim::sqrt(prim::warp_sum(squares));
    const float dot = total(d + dv);
    for (int i = prim::thread_id(); i < d; i += kThreads) {
      float y = total(i);
      if (cosine) {
        const float unit = prim::to_float(prim::load_global(pad + i)) / norm;
        y = norm < kNormEps ? y / kNormEps : (y - unit * dot) / norm;
      }
      prim::store_global(static_cast<T*>(g.p.dpad_k) + static_cast<int64_t>(head) * d + i,
                         prim::from_float<T>(y * scale));
    }
    for (int i = prim::thread_id(); i < dv; i += kThreads)
      prim::store_global(static_cast<T*>(g.p.dpad_v) + static_cast<int64_t>(head) * dv + i,
                         prim::from_float<T>(total(d + i)));
  }
  if (cosine && prim::thread_id() == 0) {
    const bool clamped = load_small(g.p.logit_scale, head, g.p.logit_scale_dtype) > kLogitScaleMax;
    store_small(g.p.dlogit_scale, head, g.p.logit_scale_dtype, clamped ? 0.f : total(d + dv + 1) * scale);
  }
}

}  // namespace window_attention_impl
}  // namespace cuda
}  // namespace effvit
