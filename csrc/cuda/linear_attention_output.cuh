// Linear attention: rows of results, from a state (walk) or with a sum over the other side added (chunk). See
// linear_attention.cuh.
#pragma once
#include "linear_attention_common.cuh"

namespace effvit {
namespace cuda {
namespace linear_attention_impl {

// A slab of the state in accumulators, by way of the stage.
template <class T>
EFFVIT_DEVICE void load_state(const Cta<T>& c, float (&state)[kTiles][4], const float* from, int first_col) {
  const Pass& g = c.g;
  const auto stage = c.stage();
  const bool transposed = g.state.col_stride != 1;
  EFFVIT_NO_UNROLL
  for (int block = 0; block < g.blocks; ++block) {
    prim::sync_threads();  // the previous readers
    EFFVIT_NO_UNROLL
    for (int i = prim::thread_id(); i < kTile * g.slab_cols; i += kThreads) {
      const int row = transposed ? i % kTile : i / g.slab_cols;
      const int col = transposed ? i / kTile : i - row * g.slab_cols;
      const bool inside = block * kTile + row < g.dim_x && first_col + col < g.dim_out;
      const float* const at = from + static_cast<int64_t>(block * kTile + row) * g.state.row_stride +
                              static_cast<int64_t>(first_col + col) * g.state.col_stride;
      stage.hi.store(row * stage.stride + col, inside ? prim::load_global(at) : 0.f);
    }
    prim::sync_threads();
    for_each_pair<kTiles>(kTiles, [&](int i, int half, int row, int) {
      if (c.state_block(i) != block) return;
      const auto pair = stage.hi.template load_vec<Vec<float, 2>>(row * stage.stride + c.state_col(i));
      state[i][2 * half] = pair.v[0], state[i][2 * half + 1] = pair.v[1];
    });
  }
}
template <class T>
EFFVIT_DEVICE void store_state(const Cta<T>& c, const WideTile<T>& to, const float (&state)[kTiles][4]) {
  if (c.warp_row >= c.block_cols) return;
  for_each_pair<kTiles>(c.g.blocks * c.slab_tiles, [&](int i, int half, int row, int) {
    store_pair(to, (c.state_block(i) * kTile + row) * to.stride + c.state_col(i), state[i][2 * half],
               state[i][2 * half + 1]);
  });
}

// Adds x . z of the rows of x's own denominators to row_den, from the pieces that pass by.
template <class T>
EFFVIT_DEVICE void add_row_den(const Cta<T>& c, int at, int row, int col, const float (&x)[kVec<T>]) {
  float dot = 0.f;
  EFFVIT_UNROLL
  for (int e = 0; e < kVec<T>; ++e) dot += x[e] * c.zden().load(col + e);
  dot = tile::row_sum(dot, c.g.x_shift);
  if (col % c.block_cols != 0) return;
  c.row_den().store(at + row, col == 0 ? dot : c.row_den().load(at + row) + dot);
}

// Prepares x in its buffer. Denominators that are not given are summed up on the way, if `with_den`.
template <class T>
EFFVIT_DEVICE void transform_x(const Cta<T>& c, const WideTile<T>& tile, const Work& work, int64_t first, int block,
                               int den_at, bool with_den) {
  const Pass& g = c.g;
  const int col = block * kTile;
  const bool of_x = with_den && g.denominator == Denominator::kOfX;
  transform_tile(g, tile, g.x, work, first, work.stop, col, of_x, [&](int row, int at, const auto& x) {
    if (of_x) add_row_den(c, den_at, row, col + at, x);
  });
  if (!with_den || g.denominator != Denominator::kOfRows) return;
  const Rows& from = g.z_rows;
  const int at = piece_col<T>(tile.shift), length = piece_length<T>(from.dim - col - at);
  for_each_piece_row(tile.shift, [&](int row) {
    const int n = first + row < work.stop ? length : 0;
    float x[kVec<T>];
    map_piece<T>(load_piece(row_at<T>(from, work, first + row) + col + at, n, from.vec), from.map, x);
    scale_piece<T>(x, 1.f, n);
    add_row_den(c, den_at, row, col + at, x);
  });
}

// Writes y, this warp's 16 rows of one slab, as the pass wants it. den_at: where in row_den its denominators are.
template <class T>
EFFVIT_DEVICE void write_rows(const Cta<T>& c, const Work& work, int slab, int64_t first, const float (&acc)[kTiles][4],
                              int den_at) {
  const Pass& g = c.g;
  const auto& p = g.p;
  const int64_t length = g.length();
  const auto stage = c.stage();
  const bool fresh_den = g.denominator != Denominator::kGiven;
  const bool dots = g.epilogue == Epilogue::kRows || (g.epilogue == Epilogue::kValueGradient && p.weight != nullptr);
  prim::sync_warp();  // the previous readers
  store_acc(stage, 0, acc, c.slab_tiles);
  prim::sync_warp();
  for_each_shifted_piece<T>(g.slab_shift, [&](int row, int piece) {
    const int col = slab * g.slab_cols + piece;
    const int64_t token = first + row;
    const int n = token >= work.stop ? 0 : piece_length<T>(g.dim_out - col);
    float dot = 0.f;
    if (n != 0) {
      float y[kVec<T>];
      EFFVIT_UNROLL
      for (int e = 0; e < kVec<T>; e += 4) {
        const auto v = stage.hi.template load_vec<Vec<float, 4>>(row * stage.stride + piece + e);
        EFFVIT_UNROLL
        for (int f = 0; f < 4; ++f) y[e + f] = v.v[f];
      }
      if (g.rank_one != RankOne::kNone) {
        const float rho = c.rho().load(row);
        EFFVIT_UNROLL
        for (int e = 0; e < kVec<T>; ++e) y[e] += rho * c.zvec().load(piece + e);
      }
      float factor;
      if (g.epilogue == Epilogue::kOut) {
        factor = p.scale;
        if (p.normalize != Normalize::kNone) {
          const float z =
              fresh_den ? c.row_den().load(den_at + row) : prim::load_global(g.den + query_index(p, work, token));
          factor /= denominator(p, work, token, z);
        }
      } else {
        factor = row_factor(g, g.out_factor, work, token);
        if (dots || g.e.map != FeatureMap::kNone) {
          const auto e = load_piece(row_at<T>(g.e, work, token) + col, n, g.e.vec);
          EFFVIT_UNROLL
          for (int k = 0; k < kVec<T>; ++k) {
            const float x = prim::to_float(e.v[k]);
            dot += k < n ? y[k] * x : 0.f;
            y[k] *= map_derivative(g.e.map, x);
          }
        }
      }
      if (g.epilogue != Epilogue::kRows) {
        Piece<T> out;
        EFFVIT_UNROLL
        for (int e = 0; e < kVec<T>; ++e) out.v[e] = prim::from_float<T>(y[e] * factor);
        T* const to = static_cast<T*>(g.out) + ((work.batch * length + token) * p.H + work.head) * g.dim_out + col;
        store_piece(to, out, n, g.out_vec);
      }
    }
    if (dots) {
      dot = tile::row_sum(dot, g.slab_shift);
      if (piece == 0) c.row_sum().store(row, dot);
    }
  });
  if (!dots) return;
  prim::sync_warp();
  const int row = c.warp_row + c.lane;
  const int64_t token = first + row, element = (work.batch * length + token) * p.H + work.head;
  if (c.lane < 16 && token < work.stop) {  // the owner of a row is the same lane for every slab
    float sum = c.row_sum().load(row);
    if (g.epilogue == Epilogue::kRows) {
      if (slab != 0) sum += prim::load_global(g.grad_den + element);
      if (slab == g.slabs - 1) {
        const float z = fresh_den ? c.row_den().load(den_at + row) : prim::load_global(g.den + element);
        const float d = denominator(p, work, token, z);
        sum = p.normalize == Normalize::kClamp && z < p.clamp_min ? 0.f : -(sum * (p.scale / d)) / d;
        if (fresh_den) prim::store_global(g.den + element, z);
      }
      prim::store_global(g.grad_den + element, sum);
    } else {
      if (slab != 0 || g.row_sum_given) sum += prim::load_global(g.row_sum + element);
      if (slab == g.slabs - 1) {
        store_small(p.dweight, element, p.weight_dtype, sum);
      } else {
        prim::store_global(g.row_sum + element, sum);
      }
    }
  }
}

// The factors of a warp's rows of a tile in the term of rank one, as queries and as keys. A barrier must follow.
template <class T>
EFFVIT_DEVICE void load_factors(const Cta<T>& c, const Work& work, int64_t first) {
  const Pass& g = c.g;
  const int row = c.warp_row + c.lane % 16;
  const bool inside = first + row < work.stop;
  if (c.lane < 16) {
    if (g.rank_one != RankOne::kNone) c.rho().store(row, inside ? row_factor(g, g.rho, work, first + row) : 0.f);
  } else if (g.has_rank_rows()) {
    c.gamma().store(row, inside ? row_factor(g, g.gamma, work, first + row) : 0.f);
  }
}

template <class T>
EFFVIT_KERNEL(kThreads, 4)
linear_attention_walk_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  const Cta<T> c(g);
  const WideTile<T> planes = c.state_tile();
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    const Work work = work_at(g, id);
    if (work.first == work.stop) continue;
    const int blocks = g.has_x() ? g.blocks : 1;
    const auto load = [&](int64_t first, int block, int x_at) {
      if (g.has_x()) load_tile(c.x_tile(x_at), g.x, work, first, work.stop, block * kTile);
      prim::cp_async_commit();
    };
    EFFVIT_NO_UNROLL
    for (int slab = work.slab; slab < g.slabs; slab += g.slab_loop ? 1 : g.slabs) {
      prim::sync_threads();  // the previous slab's readers
      load(work.first, 0, 0);
      float acc[kTiles][4];
      if (g.has_x()) load_planes(c, planes, g.state.base + work.block * g.state.stride, slab * g.slab_cols);
      load_vectors(c, work, slab);
      prim::sync_threads();
      clear(acc);
      int64_t first = work.first;
      int block = 0, x_at = 0, den_at = 0;
      EFFVIT_NO_UNROLL
      while (first < work.stop) {
        const WideTile<T> x = c.x_tile(x_at);
        prim::cp_async_wait<0>();
        // From here on a warp touches its own 16 rows only, of x and of the vectors: warps do not wait for each other.
        if (Wide<T>::kSplit || g.rank_one != RankOne::kNone)
          prim::sync_warp();  // the readers of what has one buffer: lo, and rho
        if (g.has_x()) transform_x(c, x, work, first, block, den_at, true);
        if (block == 0) load_factors(c, work, first);
        prim::sync_warp();  // these rows are complete, and the other buffer's readers are done
        const int next_block = block + 1 == blocks ? 0 : block + 1;
        const int64_t next = next_block == 0 ? first + kTile : first;
        x_at = 1 - x_at;
        if (next < work.stop) load(next, next_block, x_at);
        if (g.has_x())
          product<kDepthLast, kDepthFirst>(acc, c.slab_tiles, x.at(c.warp_row, 0), planes.at(block * kTile, 0),
                                           c.block_cols);
        if (next_block == 0) {
          write_rows(c, work, slab, first, acc, den_at);
          clear(acc);
          den_at = kTile - den_at;  // the next tile's denominators arrive while these are read
        }
        first = next;
        block = next_block;
      }
    }
  }
}

template <class T>
EFFVIT_KERNEL(kThreads, 2)
linear_attention_chunk_kernel(EFFVIT_GRID_CONSTANT Pass g) {
  const Cta<T> c(g);
  const WideTile<T> planes = c.state_tile(), x = c.x_tile(0), a = c.a_tile(0), b = c.b_tile(0);
  WideTile<T> scores_tile;
  if constexpr (!kTensorCores<T>) scores_tile = WideTile<T>(g.s_p, g.s_p, kTile, 4);
  const auto masked = [&](int i, int j) { return g.reverse() ? j < i : j > i; };
  EFFVIT_NO_UNROLL
  for (int64_t id = prim::cta_id(); id < g.ctas; id += prim::cta_count()) {
    const Work work = work_at(g, id);
    if (work.first == work.stop) continue;
    const int64_t others = g.other_length(), tiles = tile_count(work);
    EFFVIT_NO_UNROLL
    for (int slab = work.slab; slab < g.slabs; slab += g.slab_loop ? 1 : g.slabs) {
      const int first_col = slab * g.slab_cols;
      float state[kTiles][4];
      clear(state);
      prim::sync_threads();  // the previous slab's readers
      if (g.causal() && g.has_x()) {
        load_state(c, state, g.state.base + work.block * g.state.stride + work.split * g.state.split_stride, first_col);
        store_state(c, planes, state);
      }
      load_vectors(c, work, slab);
      EFFVIT_NO_UNROLL
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = work.first + (g.reverse() ? tiles - 1 - tile : tile) * kTile;
        float acc[kTiles][4], p[kTiles][4];
        clear(acc);
        // Causal: the own tile. Quadratic: all, and one without keys where there is none.
        const int64_t first_other = g.causal() ? first : 0, stop_other = g.causal() ? work.stop : others;
        const int64_t last_other = g.causal() ? first + 1 : others > 1 ? others : 1;
        EFFVIT_NO_UNROLL
        for (int64_t other = first_other; other < last_other && g.has_x(); other += kTile) {
          clear(p);
          EFFVIT_NO_UNROLL
          for (int block = 0; block < g.blocks; ++block) {
            const bool load_x = g.blocks > 1 || other == first_other;
            prim::sync_threads();  // the previous tiles' readers
            if (load_x) load_tile(x, g.x, work, first, work.stop, block * kTile);
            load_tile(a, g.a, work, other, stop_other, block * kTile);
            if (block == 0) load_tile(b, g.b, work, other, stop_other, first_col);
            prim::cp_async_commit();
            if (block == 0 && other == first_other) load_factors(c, work, first);
            prim::cp_async_wait<0>();
            if (load_x) transform_x(c, x, work, first, block, 0, other == first_other);
            transform_tile(g, a, g.a, work, other, stop_other, block * kTile);
            if (block == 0) transform_tile(g, b, g.b, work, other, stop_other, first_col);
            prim::sync_threads();  // the tiles are complete
            product<kDepthLast, kDepthLast>(p, kTiles, x.at(c.warp_row, 0), a.at(0, 0), c.block_cols);
            if (g.causal()) {
              product<kDepthLast, kDepthFirst>(acc, c.slab_tiles, x.at(c.warp_row, 0), planes.at(block * kTile, 0),
                                               c.block_cols);
              if (c.warp_row < c.block_cols)
                product<kDepthFirst, kDepthFirst>(state, c.slab_tiles, a.at(0, c.warp_row), b.at(0, 0), kTile,
                                                  block * c.slab_tiles);
            }
          }
          if (g.causal()) {
            const bool merged = g.rank_one == RankOne::kMerged;
            const float rho[2] = {merged ? c.rho().load(c.row) : 0.f, merged ? c.rho().load(c.row + 8) : 0.f};
            for_each_acc<kTiles>(kTiles, [&](int n, int e) {
              const int i = c.row + e / 2 * 8, j = n * 8 + c.column + e % 2;
              if (merged) p[n][e] += rho[e / 2] * c.gamma().load(j);
              if (masked(i, j)) p[n][e] = 0.f;
            });
          }
          score_product<Wide<T>>(acc, c.slab_tiles, p, b.at(0, 0), kTile, scores_tile);
        }
        if (g.rank_one == RankOne::kOwnRows) {
          prim::sync_threads();  // the readers of b
          load_tile(b, g.rank, work, first, work.stop, first_col);
          prim::cp_async_commit();
          if (!g.has_x()) load_factors(c, work, first);
          prim::cp_async_wait<0>();
          transform_tile(g, b, g.rank, work, first, work.stop, first_col);
          prim::sync_threads();  // the tile is complete
          const float rho[2] = {c.rho().load(c.row), c.rho().load(c.row + 8)};
          for_each_acc<kTiles>(kTiles, [&](int n, int e) {
            const int i = c.row + e / 2 * 8, j = n * 8 + c.column + e % 2;
            p[n][e] = masked(i, j) ? 0.f : rho[e / 2] * c.gamma().load(j);
          });
          score_product<Wide<T>>(acc, c.slab_tiles, p, b.at(0, 0), kTile, scores_tile);
        }
        write_rows(c, work, slab, first, acc, 0);
        if (!g.causal()) continue;
        prim::sync_threads();  // the readers of the state and of zvec
        if (g.has_x()) store_state(c, planes, state);
        if (g.has_rank_rows() && prim::thread_id() < g.slab_cols) {
          const int col = prim::thread_id();
          float z = c.zvec().load(col), low = c.zlow().load(col), sum = 0.f;
          EFFVIT_NO_UNROLL
          for (int j = 0; j < kTile; ++j) sum += c.gamma().load(j) * load_element(b, j * b.stride + col);
          add_compensated(z, low, sum);
          c.zvec().store(col, z);
          c.zlow().store(col, low);
        }
      }
    }
  }
}

}  // namespace linear_attention_impl
}  // namespace cuda
}  // namespace effvit
