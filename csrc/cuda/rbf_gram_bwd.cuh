// Backward passes of rbf_gram. See rbf_gram.cuh.
#pragma once
#include "rbf_gram_common.cuh"

namespace effvit {
namespace cuda {
namespace rbf_gram_impl {

// The tile of P: rows are queries, columns keys. Rows and columns beyond the tensor are zero; with kFlatVectors the
// columns are so already.
template <class T>
EFFVIT_DEVICE void load_products(const Plan& g, const Shared<float>& to, const T* grad, const T* out, int rows,
                                 int cols) {
  using V = Piece<T>;
  const int64_t grad_stride = g.p.grad_out_stride_l, out_stride = g.p.M;
  const auto product = [](const T* x, const T* y) {
    return prim::to_float(prim::load_global(x)) * prim::to_float(prim::load_global(y));
  };
  if (g.access == kRowVectors) {
    constexpr int kPieces = kTile / kVec<T>, kInFlight = 2;
    EFFVIT_NO_UNROLL
    for (int i0 = prim::thread_id(); i0 < kTile * kPieces; i0 += kInFlight * kThreads) {
      V u[kInFlight], w[kInFlight];
      EFFVIT_UNROLL
      for (int j = 0; j < kInFlight; ++j) {
        const int i = i0 + j * kThreads, row = i / kPieces, col = i % kPieces * kVec<T>;
        u[j] = w[j] = V{};
        if (row < rows && col < cols) {
          u[j] = prim::load_global_vec<V>(grad + row * grad_stride + col);
          w[j] = prim::load_global_vec<V>(out + row * out_stride + col);
        }
      }
      EFFVIT_UNROLL
      for (int j = 0; j < kInFlight; ++j) {
        const int i = i0 + j * kThreads, at = i / kPieces * kProductStride + i % kPieces * kVec<T>;
        EFFVIT_UNROLL
        for (int e = 0; e < kVec<T>; e += 4) {
          Float4 y;
          EFFVIT_UNROLL
          for (int c = 0; c < 4; ++c) y.v[c] = prim::to_float(u[j].v[e + c]) * prim::to_float(w[j].v[e + c]);
          to.store_vec(at + e, y);
        }
      }
    }
  } else if (g.access == kFlatVectors) {
    const int count = rows * cols, whole = count / kVec<T> * kVec<T>;
    EFFVIT_NO_UNROLL
    for (int i = prim::thread_id() * kVec<T>; i < whole; i += kThreads * kVec<T>) {
      const V u = prim::load_global_vec<V>(grad + i), w = prim::load_global_vec<V>(out + i);
      BlockPosition at(i, cols);
      EFFVIT_UNROLL
      for (int e = 0; e < kVec<T>; ++e, at.next())
        to.store(at.row * kProductStride + at.col, prim::to_float(u.v[e]) * prim::to_float(w.v[e]));
    }
    for (int i = whole + prim::thread_id(); i < count; i += kThreads) {
      const BlockPosition at(i, cols);
      to.store(at.row * kProductStride + at.col, product(grad + i, out + i));
    }
    for (int i = rows * kTile + prim::thread_id(); i < kTile * kTile; i += kThreads)
      if (i % kTile < cols) to.store(i / kTile * kProductStride + i % kTile, 0.f);
  } else {
    EFFVIT_NO_UNROLL
    for (int i = prim::thread_id(); i < kTile * kTile; i += kThreads) {
      const int row = i / kTile, col = i % kTile;
      const bool inside = row < rows && col < cols;
      to.store(row * kProductStride + col,
               inside ? product(grad + row * grad_stride + col, out + row * out_stride + col) : 0.f);
    }
  }
}
EFFVIT_DEVICE void clear_columns(const Shared<float>& products, int cols) {
  for (int i = prim::thread_id(); i < kTile * kTile; i += kThreads)
    if (i % kTile >= cols) products.store(i / kTile * kProductStride + i % kTile, 0.f);
}

// What a thread accumulates of a tile of dx: sums over j of P_ij, and of P_ij y_j for kTile columns.
template <class T, bool = kTensorCores<T>>
struct Gradient;

template <class T>
struct Gradient<T, true> {
  float acc[kTiles][4], sum[2] = {0.f, 0.f};
  float scale[2] = {kLargestScale, kLargestScale};  // what P was multiplied by before it was rounded, a power of two
  static constexpr float kLargestScale = 1.15292150460684698e18f;  // 2^60

  EFFVIT_DEVICE Gradient() { clear(acc); }

  // Lowers the scale of a row so that its largest P lies in [2^14, 2^15), if it would be larger.
  EFFVIT_DEVICE void rescale(const float (&p)[kTiles][4], int n_tiles) {
    float rows[2] = {0.f, 0.f};
    for_each_acc<kTiles>(n_tiles, [&](int n, int e) {
      const float x = p[n][e] < 0.f ? -p[n][e] : p[n][e];
      rows[e / 2] = x > rows[e / 2] ? x : rows[e / 2];
    });
    EFFVIT_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float largest = prim::warp_max<4>(rows[r]);
      if (largest * scale[r] >= 32768.f) {
        // 2^(14 - e) for largest in [2^e, 2^(e + 1)); e is at least 15 - 60
        const uint32_t exponent = prim::bit_cast<uint32_t>(largest) >> 23;
        const float lower = prim::bit_cast<float>((127u + 14u + 127u - exponent) << 23);
        const float ratio = lower * (1.f / scale[r]);
        sum[r] *= ratio;
        EFFVIT_UNROLL
        for (int n = 0; n < kTiles; ++n) acc[n][2 * r] *= ratio, acc[n][2 * r + 1] *= ratio;
        scale[r] = lower;
      }
    }
  }

  // Adds the tile `products` (kTransposed: its transpose) times y. `depth` rows of y are used, cols of its columns.
  template <bool kTransposed>
  EFFVIT_DEVICE void add(const Shared<float>& products, const Tile<Native<T>>& y, int depth, int cols) {
    const int n_tiles = (depth + 15) / 16 * 2;
    float p[kTiles][4];
    clear(p);
    for_each_pair<kTiles>(n_tiles, [&](int n, int half, int i, int j) {
      if constexpr (kTransposed) {
        p[n][2 * half] = products.load(j * kProductStride + i);
        p[n][2 * half + 1] = products.load((j + 1) * kProductStride + i);
      } else {
        const auto x = products.load_vec<Vec<float, 2>>(i * kProductStride + j);
        p[n][2 * half] = x.v[0];
        p[n][2 * half + 1] = x.v[1];
      }
    });
    if constexpr (Traits<T>::kScaled) {
      rescale(p, n_tiles);
      for_each_acc<kTiles>(kTiles, [&](int n, int e) { p[n][e] *= scale[e / 2]; });
    }
    EFFVIT_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      EFFVIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (n < n_tiles) {
          float low, high;
          unpack2<T>(prim::pack2<T>(p[n][2 * half], p[n][2 * half + 1]), low, high);
          sum[half] += low + high;
        }
      }
    }
    score_product(acc, cols / 8, p, y.at(0, 0), depth, {});
  }

  // f(row, column, x sum - acc at the column and its right neighbour) with x, the tile of kTile rows, in shared memory.
  template <class F>
  EFFVIT_DEVICE void finish(const Tile<Native<T>>& x, int cols, const F& f) const {
    float inverse[2], total[2];
    EFFVIT_UNROLL
    for (int r = 0; r < 2; ++r) {
      inverse[r] = Traits<T>::kScaled ? 1.f / scale[r] : 1.f;
      total[r] = prim::warp_sum<4>(sum[r]) * inverse[r];
    }
    for_each_pair<kTiles>(kTiles, [&](int n, int r, int i, int j) {
      if (j >= cols) return;
      const auto v = x.hi.template load_vec<Vec<T, 2>>(i * x.stride + j);
      f(i, j, prim::to_float(v.v[0]) * total[r] - acc[n][2 * r] * inverse[r],
        prim::to_float(v.v[1]) * total[r] - acc[n][2 * r + 1] * inverse[r]);
    });
  }
};

// float32: rows block_row() + i, columns 4 (thread % 8) + 32 n and the next three.
template <class T>
struct Gradient<T, false> {
  float acc[4][2][4], sum[4] = {0.f, 0.f, 0.f, 0.f};

  static EFFVIT_DEVICE int column() { return prim::thread_id() % 8 * 4; }

  EFFVIT_DEVICE Gradient() {
    for_each_block<2>([&](int i, int n, int c) { acc[i][n][c] = 0.f; });
  }

  template <bool kTransposed>
  EFFVIT_DEVICE void add(const Shared<float>& products, const Tile<Native<T>>& y, int depth, int cols) {
    EFFVIT_NO_UNROLL
    for (int k = 0; k < depth; k += 4)
      block_step<kTransposed>(acc, k, products, kProductStride, block_row(), y.hi, y.stride, column(), 32, cols,
                              [&](int i, float x) { sum[i] += x; });
  }

  template <class F>
  EFFVIT_DEVICE void finish(const Tile<Native<T>>& x, int cols, const F& f) const {
    EFFVIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      EFFVIT_UNROLL
      for (int n = 0; n < 2; ++n) {
        if (n * 32 < cols) {
          const int row = block_row() + i, col = column() + 32 * n;
          const Float4 v = x.hi.template load_vec<Float4>(row * x.stride + col);
          EFFVIT_UNROLL
          for (int e = 0; e < 4; e += 2)
            f(row, col + e, v.v[e] * sum[i] - acc[i][n][e], v.v[e + 1] * sum[i] - acc[i][n][e + 1]);
        }
      }
    }
  }
};

// Writes columns [first, first + cols) of this warp's 16 rows of dx, computed over x in shared memory: x holds whole
// tokens of [., H, D] in memory, `to` points at column `first` of the tile's first row.
template <class T>
EFFVIT_DEVICE void store_gradient(const Plan& g, const Gradient<T>& gradient, const Tile<Native<T>>& x, T* to, int rows,
                                  int cols, bool vec) {
  const float factor = -2.f * g.p.gamma;
  gradient.finish(x, round_up(cols, Traits<T>::kBackwardPad), [&](int row, int col, float low, float high) {
    store_pair(x, row * x.stride + col, factor * low, factor * high);
  });
  prim::sync_warp();
  store_rows(x, cols, vec, [&](int row) { return row < rows ? to + row * g.p.H * g.p.D : nullptr; });
}

// What both gradients work with: tiles of q and k at columns [first, first + cols), and P.
template <class T>
struct BackwardTile {
  static constexpr int kSharedBytes = 2 * Traits<T>::kBytes + kTile * kProductStride * 4;

  const Plan& g;
  Tile<Native<T>> q, k;
  Shared<float> products;
  int64_t b, h;
  int first, cols, out_cols;

  EFFVIT_DEVICE explicit BackwardTile(const Plan& plan)
      : g(plan),
        q(0, kTile, kTile),
        k(Traits<T>::kBytes, kTile, kTile),
        products(2 * Traits<T>::kBytes, kTile * kProductStride) {}

  EFFVIT_DEVICE void set_unit(int64_t chunk, int64_t bh) {
    h = take_index(bh, g.p.H), b = bh;
    first = static_cast<int>(chunk) * kTile;
    cols = min_of(kTile, g.d_pad - first), out_cols = min_of(kTile, static_cast<int>(g.p.D) - first);
  }
  // Loads P, and the operands that a walk does not have yet.
  EFFVIT_DEVICE void load(int64_t qt, int64_t kt, int queries, int keys, bool load_q, bool load_k, bool start) const {
    const auto& p = g.p;
    prim::sync_threads();  // the previous tiles' readers
    if (start && g.access == kFlatVectors) clear_columns(products, keys);
    if (load_q) load_tokens(q, g.q, b, h, qt, queries, first, cols);
    if (load_k) load_tokens(k, g.k, b, h, kt, keys, first, cols);
    prim::cp_async_commit();
    load_products(g, products,
                  static_cast<const T*>(p.grad_out) + b * p.grad_out_stride_b + h * p.grad_out_stride_h +
                      qt * kTile * p.grad_out_stride_l + kt * kTile,
                  static_cast<const T*>(p.out) + ((b * p.H + h) * p.L + qt * kTile) * p.M + kt * kTile, queries, keys);
    prim::cp_async_wait<0>();
    prim::sync_threads();
  }
  EFFVIT_DEVICE void store_dq(const Gradient<T>& dq, int64_t qt, int queries) const {
    store_gradient(g, dq, q, static_cast<T*>(g.p.dq) + ((b * g.p.L + qt * kTile) * g.p.H + h) * g.p.D + first, queries,
                   out_cols, g.dq_vec);
  }
};

// dq: a CTA owns a tile of queries and a chunk of columns, and walks over the keys.
template <class T>
EFFVIT_KERNEL(kThreads, 3)
rbf_gram_bwd_dq_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  BackwardTile<T> tile(g);
  EFFVIT_NO_UNROLL
  for (int64_t unit = prim::cta_id(); unit < g.units; unit += prim::cta_count()) {
    int64_t i = unit;
    const int64_t chunk = take_index(i, g.col_chunks), qt = take_index(i, g.q_tiles);
    tile.set_unit(chunk, i);
    const int queries = tile_rows(g.p.L, qt);
    const bool has_rows = warp_row() < queries;
    Gradient<T> dq;
    EFFVIT_NO_UNROLL
    for (int64_t kt = 0; kt < g.k_tiles; ++kt) {
      const int keys = tile_rows(g.p.M, kt);
      tile.load(qt, kt, queries, keys, kt == 0, true, kt == 0);
      if (has_rows) dq.template add<false>(tile.products, tile.k, keys, tile.cols);
    }
    if (has_rows) tile.store_dq(dq, qt, queries);
  }
}

// dk: a CTA owns a tile of keys and a chunk of columns, and walks over a piece of the queries. kWithDq: there is one
// tile of keys, and dq is computed on the way.
template <class T, bool kWithDq>
EFFVIT_KERNEL(kThreads, 3)
rbf_gram_bwd_dk_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  BackwardTile<T> tile(g);
  EFFVIT_NO_UNROLL
  for (int64_t unit = prim::cta_id(); unit < g.units; unit += prim::cta_count()) {
    int64_t i = unit;
    const int64_t chunk = take_index(i, g.col_chunks), kt = take_index(i, g.k_tiles);
    const int64_t heads = g.p.B * g.p.H, bh = take_index(i, heads), split = i;
    tile.set_unit(chunk, bh);
    const int keys = tile_rows(g.p.M, kt);
    const bool has_keys = warp_row() < keys;
    const int64_t begin = split * g.split_tiles, end = least(begin + g.split_tiles, g.q_tiles);
    Gradient<T> dk;
    EFFVIT_NO_UNROLL
    for (int64_t qt = begin; qt < end; ++qt) {
      const int queries = tile_rows(g.p.L, qt);
      tile.load(qt, kt, queries, keys, true, qt == begin, qt == begin);
      if (has_keys) dk.template add<true>(tile.products, tile.q, queries, tile.cols);
      if constexpr (kWithDq) {
        const bool has_queries = warp_row() < queries;
        Gradient<T> dq;
        if (has_queries) dq.template add<false>(tile.products, tile.k, keys, tile.cols);
        prim::sync_threads();  // the readers of q, over which dq is computed
        if (has_queries) tile.store_dq(dq, qt, queries);
      }
    }
    if (!has_keys) continue;
    if (g.splits == 1) {
      // In place over k, whose readers are done: dq was followed by a barrier, and dk alone does not read k.
      store_gradient(g, dk, tile.k,
                     static_cast<T*>(g.p.dk) + ((tile.b * g.p.M + kt * kTile) * g.p.H + tile.h) * g.p.D + tile.first,
                     keys, tile.out_cols, g.dk_vec);
    } else {
      float* const to = g.partials + ((split * heads + bh) * g.p.M + kt * kTile) * g.partial_stride + tile.first;
      dk.finish(tile.k, round_up(tile.out_cols, 2), [&](int row, int col, float low, float high) {
        if (row < keys && col < tile.out_cols)
          prim::store_global_vec(to + int64_t{row} * g.partial_stride + col, Vec<float, 2>{{low, high}});
      });
    }
  }
}

template <class Index>  // a template only so that several translation units may hold it
EFFVIT_KERNEL(kReduceThreads, 4) rbf_gram_bwd_reduce_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const auto& p = g.p;
  const int64_t count = p.B * p.M * p.H * p.D, split = p.B * p.H * p.M * g.partial_stride;
  const float factor = -2.f * p.gamma;
  for (Index i = prim::cta_id() * kReduceThreads + prim::thread_id(); i < count;
       i += prim::cta_count() * kReduceThreads) {
    int64_t at = i;
    const int64_t d = take_index(at, p.D), h = take_index(at, p.H), m = take_index(at, p.M), b = at;
    const float* const from = g.partials + ((b * p.H + h) * p.M + m) * g.partial_stride + d;
    float sum = 0.f;
    for (int s = 0; s < g.splits; ++s) sum += prim::load_global(from + s * split);
    store_small(p.dk, i, p.dtype, factor * sum);
  }
}

}  // namespace rbf_gram_impl
}  // namespace cuda
}  // namespace effvit
