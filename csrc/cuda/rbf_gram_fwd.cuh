// Forward pass of rbf_gram. See rbf_gram.cuh.
#pragma once
#include "rbf_gram_common.cuh"

namespace effvit {
namespace cuda {
namespace rbf_gram_impl {

// Sum of squares of one row's columns.
template <class T>
EFFVIT_DEVICE float square_sum(const Shared<T>& x, int stride, int row, int cols) {
  float even = 0.f, odd = 0.f;
  EFFVIT_NO_UNROLL
  for (int col = 0; col < cols; col += kVec<T>) {
    float y[kVec<T>];
    to_floats<T>(x.template load_vec<Piece<T>>(row * stride + col), y);
    EFFVIT_UNROLL
    for (int e = 0; e < kVec<T>; e += 2) even += y[e] * y[e], odd += y[e + 1] * y[e + 1];
  }
  return even + odd;
}

// What a thread accumulates of a tile's squared distances, and what becomes of them.
template <class T, bool = kTensorCores<T>>
struct Distances;

// |q|^2 + |k|^2 - 2 q.k
template <class T>
struct Distances<T, true> {
  float acc[kTiles][4], squares = 0.f;  // squares: of row `thread` of q, and then of k

  EFFVIT_DEVICE Distances() { clear(acc); }

  EFFVIT_DEVICE void add(const Tile<Native<T>>& q, const Tile<Native<T>>& k, int cols, int n_tiles) {
    squares += square_sum(prim::thread_id() < kTile ? q.hi : k.hi, q.stride, prim::thread_id() % kTile, cols);
    product<kDepthLast, kDepthLast>(acc, n_tiles, q.at(warp_row(), 0), k.at(0, 0), cols);
  }

  EFFVIT_DEVICE void finish(const Plan& g, const Shared<float>& norms, const Tile<Native<T>>& stage, int n_tiles) {
    norms.store(prim::thread_id(), squares);
    prim::sync_threads();  // and the readers of q, over which the result is staged
    const int row = acc_row(), column = acc_col();
    const float q_norm[2] = {norms.load(row), norms.load(row + 8)}, factor = -g.p.gamma * kLog2e;
    EFFVIT_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      if (n < n_tiles) {
        const auto k_norm = norms.load_vec<Vec<float, 2>>(kTile + n * 8 + column);
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) {
          const float distance = q_norm[e / 2] + k_norm.v[e % 2] - 2.f * acc[n][e];
          acc[n][e] = prim::exp2(factor * (distance < 0.f ? 0.f : distance));  // NaN stays NaN
        }
      }
    }
    store_acc(stage, 0, acc, n_tiles);
  }
};

// (q_i - k_j)^2 for the columns j = thread % 8 + 8 n.
template <class T>
struct Distances<T, false> {
  float acc[4][8];

  EFFVIT_DEVICE Distances() {
    EFFVIT_UNROLL
    for (int i = 0; i < 32; ++i) acc[i / 8][i % 8] = 0.f;
  }

  // cols is a multiple of 4. These columns are summed up first: one chain over 256 columns would lose twice as many
  // bits.
  EFFVIT_DEVICE void add(const Tile<Native<T>>& q, const Tile<Native<T>>& k, int cols, int) {
    const int q_at = block_row() * q.stride, k_at = prim::thread_id() % 8 * k.stride;
    float sum[4][8] = {};
    EFFVIT_NO_UNROLL
    for (int d = 0; d < cols; d += 4) {
      Float4 a[4];
      EFFVIT_UNROLL
      for (int i = 0; i < 4; ++i) a[i] = q.hi.template load_vec<Float4>(q_at + i * q.stride + d);
      EFFVIT_UNROLL
      for (int n = 0; n < 8; ++n) {
        const Float4 b = k.hi.template load_vec<Float4>(k_at + n * 8 * k.stride + d);
        EFFVIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) {
            const float x = a[i].v[e] - b.v[e];
            sum[i][n] += x * x;
          }
        }
      }
    }
    EFFVIT_UNROLL
    for (int i = 0; i < 32; ++i) acc[i / 8][i % 8] += sum[i / 8][i % 8];
  }

  EFFVIT_DEVICE void finish(const Plan& g, const Shared<float>&, const Tile<Native<T>>& stage, int) {
    prim::sync_threads();  // the readers of q, over which the result is staged
    EFFVIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      EFFVIT_UNROLL
      for (int n = 0; n < 8; ++n)
        stage.hi.store((block_row() + i) * stage.stride + n * 8 + prim::thread_id() % 8,
                       prim::exp(-g.p.gamma * acc[i][n]));
    }
  }
};

template <class T>
EFFVIT_KERNEL(kThreads, 4)
rbf_gram_fwd_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  constexpr int kBytes = Traits<T>::kBytes;
  const Tile<Native<T>> q(0, kTile, kTile), k(kBytes, kTile, kTile);
  const Shared<float> norms(2 * kBytes, kTensorCores<T> ? 2 * kTile : 0);  // of q, then of k
  EFFVIT_NO_UNROLL
  for (int64_t unit = prim::cta_id(); unit < g.units; unit += prim::cta_count()) {
    int64_t i = unit;
    const int64_t kt = take_index(i, g.k_tiles), qt = take_index(i, g.q_tiles), bh = i;
    const int64_t h = take_index(i, g.p.H), b = i;
    const int queries = tile_rows(g.p.L, qt), keys = tile_rows(g.p.M, kt), n_tiles = (keys + 7) / 8;
    Distances<T> distances;
    EFFVIT_NO_UNROLL
    for (int first = 0; first < g.d_pad; first += kTile) {
      const int cols = min_of(kTile, g.d_pad - first);
      prim::sync_threads();  // the buffers' previous readers
      load_tokens(q, g.q, b, h, qt, queries, first, cols);
      load_tokens(k, g.k, b, h, kt, keys, first, cols);
      prim::cp_async_commit();
      prim::cp_async_wait<0>();
      prim::sync_threads();
      distances.add(q, k, cols, n_tiles);
    }
    distances.finish(g, norms, q, n_tiles);
    prim::sync_threads();
    store_tile(g, static_cast<T*>(g.p.out) + (bh * g.p.L + qt * kTile) * g.p.M + kt * kTile, q, queries, keys);
  }
}

}  // namespace rbf_gram_impl
}  // namespace cuda
}  // namespace effvit
