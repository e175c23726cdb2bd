// Gram matrix of the Gaussian kernel, forward and backward: device code and launch, on prim only.
//
// Forward: a CTA of four warps computes 64x64 tiles of the result. Half precision: |q|^2 + |k|^2 - 2 q.k with the
// products on the tensor cores and everything else in float32. float32: the sum of squared differences, which costs a
// subtraction per term and has no cancellation.
//
// Backward: with P = grad_out * out, dx_i = -2 gamma (x_i sum_j P_ij - sum_j P_ij y_j), where x, y are q, k or, with P
// transposed, k, q. A CTA owns a tile of x and walks over tiles of y. The gradient of k is cut over the queries into
// at most 32 pieces, whose float32 sums a second kernel adds in a fixed order. Where one tile holds all keys, the CTA
// that walks over the queries computes dq as well, and P is formed once.
//
// Half precision rounds P for the tensor cores. The factor of x_i is the sum of the rounded P: the result is then the
// exact sum of P_ij (x_i - y_j) with slightly different P, and the difference of two large sums costs nothing.
// |P| <= |grad_out|, so it cannot overflow; in float16 it could underflow, so rows are scaled by powers of two.
#pragma once
#include "../common/rbf_gram_params.h"
#include "tile/block.cuh"
#include "tile/plan.cuh"
#include "tile/product.cuh"

namespace effvit {
namespace cuda {
namespace rbf_gram_impl {

using namespace tile;

constexpr int kMaxSplits = 32;
constexpr int kProductStride = kTile + 4;  // floats from row to row of P
constexpr int kReduceThreads = 256;

template <class T>
struct Traits {
  static constexpr bool kScaled = std::is_same<T, prim::float16>::value;  // rows of P are scaled
  static constexpr int kPad =
      kTensorCores<T> ? 16 : 4;  // head dims are padded with zeros to a multiple, in the forward
  static constexpr int kBackwardPad = kTensorCores<T> ? 16 : 32;  // and in the backward
  static constexpr int kStride = row_stride<T>(kTile);
  static constexpr int kBytes = static_cast<int>(tile_bytes<T>(kTile, kTile));
  static_assert(conflict_free<T>(kTile), "row stride must be an odd multiple of 16 bytes");
  static_assert(kTile % kPad == 0 && kTile % kBackwardPad == 0, "tiles hold whole steps");
};

// How tiles of a [L, M] matrix are read and written.
enum Access : int32_t {
  kElements,  // one by one
  kRowVectors,  // rows are aligned to 16 bytes
  kFlatVectors,  // rows are not, but a tile of whole rows is one aligned block
};

struct Plan {
  RbfGramParams p;
  Tokens q, k;
  int64_t q_tiles, k_tiles;
  int64_t units;  // pieces of work; CTA i does i, i + ctas, ...
  int32_t d_pad, col_chunks;
  int32_t splits;  // pieces of the queries
  int64_t split_tiles;  // query tiles of a piece
  Access access;
  bool dq_vec, dk_vec;  // 16-byte accesses are aligned
  int32_t partial_stride;
  float* partials;  // [splits, B, H, M, partial_stride]
};

// ---- tiles of tokens, and of a [L, M] matrix ----

EFFVIT_DEVICE int tile_rows(int64_t total, int64_t tile) {
  return static_cast<int>(least(kTile, total - tile * kTile));
}

// Columns [first, first + cols) of one tile of one head; zeros beyond the tensor.
template <class T>
EFFVIT_DEVICE void load_tokens(const Tile<Native<T>>& to, const Tokens& from, int64_t b, int64_t h, int64_t tile,
                               int rows, int first, int cols) {
  const T* const base = token_row<T>(from, b, tile * kTile, h) + first;
  load_rows(to, cols,
            [&](int row) { return Row<T>{base + row * from.stride_l, row < rows ? from.dim - first : 0, from.vec}; });
}

// Row and column of element i of a block of whole rows, and of the elements after it.
struct BlockPosition {
  int cols, row, col;
  EFFVIT_DEVICE BlockPosition(int i, int columns) : cols(columns), row(i / columns), col(i - row * columns) {}
  EFFVIT_DEVICE void next() {
    if (++col == cols) ++row, col = 0;
  }
};

// Writes rows x cols of a staged tile of [L, M]; `to` points at its first element.
template <class T>
EFFVIT_DEVICE void store_tile(const Plan& g, T* to, const Tile<Native<T>>& stage, int rows, int cols) {
  if (g.access == kRowVectors) {  // M is a multiple of kVec
    const int pieces = cols / kVec<T>;
    EFFVIT_NO_UNROLL
    for (int i = prim::thread_id(); i < rows * pieces; i += kThreads) {
      const int row = i / pieces, col = (i - row * pieces) * kVec<T>;
      prim::store_global_vec(to + row * g.p.M + col, stage.hi.template load_vec<Piece<T>>(row * stage.stride + col));
    }
    return;
  }
  const int count = rows * cols, whole = g.access == kFlatVectors ? count / kVec<T> * kVec<T> : 0;  // cols is M there
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id() * kVec<T>; i < whole; i += kThreads * kVec<T>) {
    BlockPosition at(i, cols);
    Piece<T> x;
    EFFVIT_UNROLL
    for (int e = 0; e < kVec<T>; ++e, at.next()) x.v[e] = stage.hi.load(at.row * stage.stride + at.col);
    prim::store_global_vec(to + i, x);
  }
  EFFVIT_NO_UNROLL
  for (int i = whole + prim::thread_id(); i < count; i += kThreads) {
    const BlockPosition at(i, cols);
    prim::store_global(to + at.row * g.p.M + at.col, stage.hi.load(at.row * stage.stride + at.col));
  }
}

// ---- forward ----

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

// A thread of the float32 kernels owns rows 4 (thread / 8) + i of a tile and eight of its columns.
EFFVIT_DEVICE int block_row() { return prim::thread_id() / 8 * 4; }

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

// ---- backward ----

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

// ---- plan and launch ----

template <class T>
Access matrix_access(const RbfGramParams& p, bool backward) {
  const int64_t size = sizeof(T);
  const bool contiguous = p.grad_out_stride_l == p.M && (p.H == 1 || p.grad_out_stride_h == p.L * p.M) &&
                          (p.B == 1 || p.grad_out_stride_b == p.H * p.L * p.M);
  if (aligned16(p.out, size, {p.M}) &&
      (!backward || aligned16(p.grad_out, size, {p.grad_out_stride_l, p.grad_out_stride_h, p.grad_out_stride_b})))
    return kRowVectors;
  // A tile of 64 rows is a multiple of 16 bytes.
  const int64_t head = p.B * p.H == 1 ? 0 : p.L * p.M;
  if (p.M <= kTile && aligned16(p.out, size, {head}) && (!backward || (contiguous && aligned16(p.grad_out, size, {}))))
    return kFlatVectors;
  return kElements;
}

template <class T>
Plan make_plan(const RbfGramParams& p, bool backward) {
  Plan g = {};
  g.p = p;
  g.q = make_tokens(p.dtype, p.q, p.q_stride_b, p.q_stride_l, p.q_stride_h, p.D);
  g.k = make_tokens(p.dtype, p.k, p.k_stride_b, p.k_stride_l, p.k_stride_h, p.D);
  g.q_tiles = ceil_div(p.L, kTile);
  g.k_tiles = ceil_div(p.M, kTile);
  g.d_pad = round_up(p.D, backward ? Traits<T>::kBackwardPad : Traits<T>::kPad);
  g.col_chunks = static_cast<int32_t>(ceil_div(p.D, kTile));
  g.access = matrix_access<T>(p, backward);
  g.dq_vec = aligned16(p.dq, sizeof(T), {p.D});
  g.dk_vec = aligned16(p.dk, sizeof(T), {p.D});
  g.splits = 1;
  g.split_tiles = g.q_tiles;
  g.units = p.B * p.H * g.q_tiles * (backward ? g.col_chunks : g.k_tiles);
  return g;
}

template <class T>
Plan dk_plan(const RbfGramParams& p, void* workspace) {
  Plan g = make_plan<T>(p, true);
  const int64_t tiles = p.B * p.H * g.k_tiles * g.col_chunks;
  g.split_tiles = ceil_div(g.q_tiles, split_count(prim::target_ctas(), tiles, kMaxSplits));
  g.splits = static_cast<int32_t>(ceil_div(g.q_tiles, g.split_tiles));
  g.units = tiles * g.splits;
  g.partial_stride = round_up(p.D, 2);
  g.partials = static_cast<float*>(workspace);
  return g;
}

template <class T>
size_t workspace_bytes(const RbfGramParams& p) {
  const Plan g = dk_plan<T>(p, nullptr);
  return g.splits == 1 ? 0 : static_cast<size_t>(g.splits * p.B * p.H * p.M * g.partial_stride) * sizeof(float);
}

inline bool is_empty(const RbfGramParams& p) { return p.B * p.H == 0 || p.L == 0 || p.M == 0; }

inline void register_inputs(prim::GlobalRanges& ranges, const RbfGramParams& p) {
  ranges.read(p.q, extent_bytes(p.dtype, {{p.B, p.q_stride_b}, {p.L, p.q_stride_l}, {p.H, p.q_stride_h}, {p.D, 1}}));
  ranges.read(p.k, extent_bytes(p.dtype, {{p.B, p.k_stride_b}, {p.M, p.k_stride_l}, {p.H, p.k_stride_h}, {p.D, 1}}));
}

}  // namespace rbf_gram_impl
}  // namespace cuda

template <class Types = cuda::AllTypes>
cudaError_t launch_rbf_gram_fwd(const RbfGramParams& p, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::rbf_gram_impl;
  if (is_empty(p)) return cudaSuccess;
  prim::GlobalRanges ranges;
  register_inputs(ranges, p);
  ranges.write_once(p.out, tensor_bytes(p.dtype, p.B * p.H * p.L * p.M));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    const Plan g = make_plan<T>(p, false);
    const int64_t bytes = 2 * Traits<T>::kBytes + (kTensorCores<T> ? 2 * kTile * 4 : 0);
    return EFFVIT_LAUNCH((rbf_gram_fwd_kernel<T>), grid_size(g.units), kThreads, bytes, stream, g);
  });
  ranges.finish();
  return error;
}

template <class Types = cuda::AllTypes>
size_t rbf_gram_bwd_workspace_bytes(const RbfGramParams& p) {
  using namespace cuda;
  using namespace cuda::rbf_gram_impl;
  if (is_empty(p)) return 0;
  size_t bytes = 0;
  (void)dispatch_dtype<Types>(p.dtype, [&](auto type) {
    bytes = workspace_bytes<decltype(type)>(p);
    return cudaSuccess;
  });
  return bytes;
}

template <class Types = cuda::AllTypes>
cudaError_t launch_rbf_gram_bwd(const RbfGramParams& p, void* workspace, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::rbf_gram_impl;
  if (is_empty(p)) return cudaSuccess;
  prim::GlobalRanges ranges;
  register_inputs(ranges, p);
  ranges.read(p.out, tensor_bytes(p.dtype, p.B * p.H * p.L * p.M));
  ranges.read(
      p.grad_out,
      extent_bytes(p.dtype,
                   {{p.B, p.grad_out_stride_b}, {p.H, p.grad_out_stride_h}, {p.L, p.grad_out_stride_l}, {p.M, 1}}));
  ranges.write(workspace, rbf_gram_bwd_workspace_bytes<Types>(p));
  ranges.write_once(p.dq, tensor_bytes(p.dtype, p.B * p.L * p.H * p.D));
  ranges.write_once(p.dk, tensor_bytes(p.dtype, p.B * p.M * p.H * p.D));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kBytes = BackwardTile<T>::kSharedBytes;
    const Plan dk = dk_plan<T>(p, workspace);
    cudaError_t status;
    if (dk.k_tiles == 1) {
      status = EFFVIT_LAUNCH((rbf_gram_bwd_dk_kernel<T, true>), grid_size(dk.units), kThreads, kBytes, stream, dk);
    } else {
      const Plan dq = make_plan<T>(p, true);
      status = EFFVIT_LAUNCH((rbf_gram_bwd_dq_kernel<T>), grid_size(dq.units), kThreads, kBytes, stream, dq);
      if (status != cudaSuccess) return status;
      status = EFFVIT_LAUNCH((rbf_gram_bwd_dk_kernel<T, false>), grid_size(dk.units), kThreads, kBytes, stream, dk);
    }
    if (status != cudaSuccess || dk.splits == 1) return status;
    const int64_t blocks = ceil_div(p.B * p.M * p.H * p.D, kReduceThreads);
    return EFFVIT_LAUNCH((rbf_gram_bwd_reduce_kernel<int64_t>), grid_size(blocks), kReduceThreads, 0, stream, dk);
  });
  ranges.finish();
  return error;
}

}  // namespace effvit
