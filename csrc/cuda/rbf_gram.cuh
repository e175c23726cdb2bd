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
#include "common.cuh"

namespace effvit {
namespace cuda {
namespace rbf_gram_impl {

using prim::Shared;
using prim::Vec;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / prim::kWarpSize;
constexpr int kTile = 64;  // rows of q, rows of k, and columns of both in shared memory at a time
constexpr int kNTiles = kTile / 8;
constexpr int kMaxSplits = 32;
constexpr int kProductStride = kTile + 4;  // floats from row to row of P
constexpr int kReduceThreads = 256;
constexpr float kLog2e = 1.4426950408889634f;

static_assert(kTile == 16 * kWarps, "a warp owns 16 rows of a tile");
static_assert(kThreads == 2 * kTile, "one thread sums up each row of q and of k");

template <class T>
struct Traits {
  static constexpr bool kTensorCores = !std::is_same<T, float>::value;
  static constexpr bool kScaled = std::is_same<T, prim::float16>::value;  // rows of P are scaled
  static constexpr int kVec = 16 / sizeof(T);  // elements of a 16-byte access
  static constexpr int kStride = kTile + kVec;  // rows are an odd multiple of 16 bytes: no bank conflicts
  static constexpr int kPad = kTensorCores ? 16 : 4;  // head dims are padded with zeros to a multiple, in the forward
  static constexpr int kBackwardPad = kTensorCores ? 16 : 32;  // and in the backward
  static_assert(kStride * sizeof(T) / 16 % 2 == 1, "row stride must be an odd multiple of 16 bytes");
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
  int64_t q_tiles, k_tiles;
  int64_t units;  // pieces of work; CTA i does i, i + ctas, ...
  int32_t d_pad, col_chunks;
  int32_t splits;  // pieces of the queries
  int64_t split_tiles;  // query tiles of a piece
  Access access;
  bool q_vec, k_vec, dq_vec, dk_vec;  // 16-byte accesses are aligned
  int32_t partial_stride;
  float* partials;  // [splits, B, H, M, partial_stride]
};

// ---- rows of q and k ----

// kTile rows of one head, from row `first` on.
template <class T>
struct Rows {
  const T* base;
  int64_t stride;
  int valid;  // rows
  int cols;
  bool vec;
};

EFFVIT_DEVICE int tile_rows(int64_t total, int64_t tile) {
  const int64_t left = total - tile * kTile;
  return left < kTile ? static_cast<int>(left) : kTile;
}
template <class T>
EFFVIT_DEVICE Rows<T> q_rows(const Plan& g, int64_t b, int64_t h, int64_t tile) {
  const auto& p = g.p;
  const T* const base = static_cast<const T*>(p.q) + b * p.q_stride_b + h * p.q_stride_h + tile * kTile * p.q_stride_l;
  return {base, p.q_stride_l, tile_rows(p.L, tile), static_cast<int>(p.D), g.q_vec};
}
template <class T>
EFFVIT_DEVICE Rows<T> k_rows(const Plan& g, int64_t b, int64_t h, int64_t tile) {
  const auto& p = g.p;
  const T* const base = static_cast<const T*>(p.k) + b * p.k_stride_b + h * p.k_stride_h + tile * kTile * p.k_stride_l;
  return {base, p.k_stride_l, tile_rows(p.M, tile), static_cast<int>(p.D), g.k_vec};
}

// Columns [first, first + cols) of kTile rows; zeros beyond the tensor. Aligned copies are left in flight.
template <class T>
EFFVIT_DEVICE void load_rows(const Shared<T>& to, const Rows<T>& from, int first, int cols) {
  constexpr int kVec = Traits<T>::kVec;
  const int chunks = cols / kVec;
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id(); i < kTile * chunks; i += kThreads) {
    const int row = i / chunks, col = (i - row * chunks) * kVec;
    int n = row < from.valid ? from.cols - first - col : 0;
    n = n < 0 ? 0 : n > kVec ? kVec : n;
    const T* const source = n == 0 ? from.base : from.base + row * from.stride + first + col;
    if (n > 0 && from.vec) {
      prim::cp_async16(to, row * Traits<T>::kStride + col, source, n * static_cast<int>(sizeof(T)));
    } else {
      Vec<T, kVec> x;
      EFFVIT_UNROLL
      for (int e = 0; e < kVec; ++e) x.v[e] = e < n ? prim::load_global(source + e) : prim::from_float<T>(0.f);
      to.store_vec(row * Traits<T>::kStride + col, x);
    }
  }
}

template <class T>
EFFVIT_DEVICE void store_pair(const Shared<T>& to, int i, float low, float high) {
  if constexpr (Traits<T>::kTensorCores) {
    to.store_vec(i, prim::pack2<T>(low, high));
  } else {
    to.store_vec(i, Vec<float, 2>{{low, high}});
  }
}

// ---- forward ----

// acc += A B^T for the 16 rows of A of this warp; cols is a multiple of 16.
template <class T>
EFFVIT_DEVICE void dot_products(float (&acc)[kNTiles][4], const Shared<T>& a, const Shared<T>& b, int cols,
                                int n_tiles) {
  constexpr int kStride = Traits<T>::kStride;
  const int lane = prim::lane_id(), low = lane % 8, half = lane / 8 % 2 * 8, quarter = lane / 16 * 8;
  const int a_at = (prim::warp_id() * 16 + low + half) * kStride + quarter, b_at = (low + quarter) * kStride + half;
  EFFVIT_NO_UNROLL
  for (int d = 0; d < cols; d += 16) {
    uint32_t af[4];
    prim::ldmatrix_x4<false>(af, a, a_at + d);
    EFFVIT_UNROLL
    for (int n = 0; n < kNTiles; n += 2) {
      if (n < n_tiles) {
        uint32_t bf[4];
        prim::ldmatrix_x4<false>(bf, b, b_at + n * 8 * kStride + d);
        prim::mma_m16n8k16<T>(acc[n], af, bf[0], bf[1]);
        prim::mma_m16n8k16<T>(acc[n + 1], af, bf[2], bf[3]);
      }
    }
  }
}

// Sum of squares of one row's columns.
template <class T>
EFFVIT_DEVICE float square_sum(const Shared<T>& x, int row, int cols) {
  constexpr int kVec = Traits<T>::kVec;
  float even = 0.f, odd = 0.f;
  EFFVIT_NO_UNROLL
  for (int col = 0; col < cols; col += kVec) {
    const auto y = x.template load_vec<Vec<T, kVec>>(row * Traits<T>::kStride + col);
    EFFVIT_UNROLL
    for (int e = 0; e < kVec; e += 2) {
      const float u = prim::to_float(y.v[e]), w = prim::to_float(y.v[e + 1]);
      even += u * u;
      odd += w * w;
    }
  }
  return even + odd;
}

// A thread of the float32 kernels owns rows 4 (thread / 8) + i of a tile and eight of its columns.
struct FloatBlock {
  static constexpr int kRows = 4, kCols = 8;
  static EFFVIT_DEVICE int row() { return prim::thread_id() / 8 * 4; }
};
using Float4 = Vec<float, 4>;

// acc += (q_i - k_j)^2 for the columns j = thread % 8 + 8 n; cols is a multiple of 4. These columns are summed up
// first: one chain over 256 columns would lose twice as many bits.
EFFVIT_DEVICE void squared_differences(float (&acc)[4][8], const Shared<float>& q, const Shared<float>& k, int cols) {
  constexpr int kStride = Traits<float>::kStride;
  const int q_at = FloatBlock::row() * kStride, k_at = prim::thread_id() % 8 * kStride;
  float sum[4][8];
  EFFVIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    EFFVIT_UNROLL
    for (int n = 0; n < 8; ++n) sum[i][n] = 0.f;
  }
  EFFVIT_NO_UNROLL
  for (int d = 0; d < cols; d += 4) {
    Float4 a[4];
    EFFVIT_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = q.load_vec<Float4>(q_at + i * kStride + d);
    EFFVIT_UNROLL
    for (int n = 0; n < 8; ++n) {
      const Float4 b = k.load_vec<Float4>(k_at + n * 8 * kStride + d);
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
  for (int i = 0; i < 4; ++i) {
    EFFVIT_UNROLL
    for (int n = 0; n < 8; ++n) acc[i][n] += sum[i][n];
  }
}

// Writes rows x cols of a staged tile of [L, M]; `to` points at its first element.
template <class T>
EFFVIT_DEVICE void store_tile(const Plan& g, T* to, const Shared<T>& stage, int rows, int cols) {
  constexpr int kVec = Traits<T>::kVec, kStride = Traits<T>::kStride;
  using V = Vec<T, kVec>;
  if (g.access == kRowVectors) {  // M is a multiple of kVec
    const int chunks = cols / kVec;
    EFFVIT_NO_UNROLL
    for (int i = prim::thread_id(); i < rows * chunks; i += kThreads) {
      const int row = i / chunks, col = (i - row * chunks) * kVec;
      prim::store_global_vec(to + row * g.p.M + col, stage.template load_vec<V>(row * kStride + col));
    }
    return;
  }
  const int count = rows * cols, whole = g.access == kFlatVectors ? count / kVec * kVec : 0;  // cols is M there
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id() * kVec; i < whole; i += kThreads * kVec) {
    int row = i / cols, col = i - row * cols;
    V x;
    EFFVIT_UNROLL
    for (int e = 0; e < kVec; ++e) {
      x.v[e] = stage.load(row * kStride + col);
      ++col;
      if (col == cols) ++row, col = 0;
    }
    prim::store_global_vec(to + i, x);
  }
  EFFVIT_NO_UNROLL
  for (int i = whole + prim::thread_id(); i < count; i += kThreads) {
    const int row = i / cols, col = i - row * cols;
    prim::store_global(to + row * g.p.M + col, stage.load(row * kStride + col));
  }
}

template <class T>
EFFVIT_KERNEL(kThreads, 4)
rbf_gram_fwd_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  using Tr = Traits<T>;
  constexpr int kElements = kTile * Tr::kStride, kBytes = kElements * static_cast<int>(sizeof(T));
  const Shared<T> q(0, kElements), k(kBytes, kElements);
  const Shared<T>& stage = q;
  const Shared<float> norms(2 * kBytes, Tr::kTensorCores ? 2 * kTile : 0);  // of q, then of k
  const int thread = prim::thread_id();

  EFFVIT_NO_UNROLL
  for (int64_t unit = prim::cta_id(); unit < g.units; unit += prim::cta_count()) {
    const int64_t kt = unit % g.k_tiles, qt = unit / g.k_tiles % g.q_tiles, bh = unit / g.k_tiles / g.q_tiles;
    const int64_t b = bh / g.p.H, h = bh - b * g.p.H;
    const Rows<T> from_q = q_rows<T>(g, b, h, qt), from_k = k_rows<T>(g, b, h, kt);
    const int n_tiles = (from_k.valid + 7) / 8;

    constexpr int kAcc0 = Tr::kTensorCores ? kNTiles : FloatBlock::kRows;
    constexpr int kAcc1 = Tr::kTensorCores ? 4 : FloatBlock::kCols;
    float acc[kAcc0][kAcc1], squares = 0.f;
    EFFVIT_UNROLL
    for (int i = 0; i < kAcc0; ++i) {
      EFFVIT_UNROLL
      for (int j = 0; j < kAcc1; ++j) acc[i][j] = 0.f;
    }
    EFFVIT_NO_UNROLL
    for (int first = 0; first < g.d_pad; first += kTile) {
      const int cols = min_of(kTile, g.d_pad - first);
      prim::sync_threads();  // the buffers' previous readers
      load_rows(q, from_q, first, cols);
      load_rows(k, from_k, first, cols);
      prim::cp_async_commit();
      prim::cp_async_wait<0>();
      prim::sync_threads();
      if constexpr (Tr::kTensorCores) {
        squares += square_sum(thread < kTile ? q : k, thread % kTile, cols);
        dot_products(acc, q, k, cols, n_tiles);
      } else {
        squared_differences(acc, q, k, cols);
      }
    }

    if constexpr (Tr::kTensorCores) {
      norms.store(thread, squares);
      prim::sync_threads();  // and the readers of q, over which the result is staged
      const int row = prim::warp_id() * 16 + prim::lane_id() / 4, column = prim::lane_id() % 4 * 2;
      const float q_norm[2] = {norms.load(row), norms.load(row + 8)}, factor = -g.p.gamma * kLog2e;
      EFFVIT_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        if (n < n_tiles) {
          const auto k_norm = norms.load_vec<Vec<float, 2>>(kTile + n * 8 + column);
          float y[4];
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) {
            const float distance = q_norm[e / 2] + k_norm.v[e % 2] - 2.f * acc[n][e];
            y[e] = prim::exp2(factor * (distance < 0.f ? 0.f : distance));  // NaN stays NaN
          }
          store_pair(stage, row * Tr::kStride + n * 8 + column, y[0], y[1]);
          store_pair(stage, (row + 8) * Tr::kStride + n * 8 + column, y[2], y[3]);
        }
      }
    } else {
      prim::sync_threads();  // the readers of q, over which the result is staged
      EFFVIT_UNROLL
      for (int i = 0; i < FloatBlock::kRows; ++i) {
        EFFVIT_UNROLL
        for (int n = 0; n < FloatBlock::kCols; ++n)
          stage.store((FloatBlock::row() + i) * Tr::kStride + n * 8 + thread % 8, prim::exp(-g.p.gamma * acc[i][n]));
      }
    }
    prim::sync_threads();
    store_tile(g, static_cast<T*>(g.p.out) + (bh * g.p.L + qt * kTile) * g.p.M + kt * kTile, stage, from_q.valid,
               from_k.valid);
  }
}

// ---- backward ----

// The tile of P: rows are queries, columns keys. Rows and columns beyond the tensor are zero; with kFlatVectors the
// columns are so already.
template <class T>
EFFVIT_DEVICE void load_products(const Plan& g, const Shared<float>& to, const T* grad, const T* out, int rows,
                                 int cols) {
  constexpr int kVec = Traits<T>::kVec;
  using V = Vec<T, kVec>;
  const int64_t grad_stride = g.p.grad_out_stride_l, out_stride = g.p.M;
  if (g.access == kRowVectors) {
    constexpr int kChunks = kTile / kVec, kInFlight = 2;
    EFFVIT_NO_UNROLL
    for (int i0 = prim::thread_id(); i0 < kTile * kChunks; i0 += kInFlight * kThreads) {
      V u[kInFlight], w[kInFlight];
      EFFVIT_UNROLL
      for (int j = 0; j < kInFlight; ++j) {
        const int i = i0 + j * kThreads, row = i / kChunks, col = i % kChunks * kVec;
        u[j] = w[j] = V{};
        if (row < rows && col < cols) {
          u[j] = prim::load_global_vec<V>(grad + row * grad_stride + col);
          w[j] = prim::load_global_vec<V>(out + row * out_stride + col);
        }
      }
      EFFVIT_UNROLL
      for (int j = 0; j < kInFlight; ++j) {
        const int i = i0 + j * kThreads, row = i / kChunks, col = i % kChunks * kVec;
        EFFVIT_UNROLL
        for (int e = 0; e < kVec; e += 4) {
          Float4 y;
          EFFVIT_UNROLL
          for (int c = 0; c < 4; ++c) y.v[c] = prim::to_float(u[j].v[e + c]) * prim::to_float(w[j].v[e + c]);
          to.store_vec(row * kProductStride + col + e, y);
        }
      }
    }
    return;
  }
  if (g.access == kFlatVectors) {
    const int count = rows * cols, whole = count / kVec * kVec;
    EFFVIT_NO_UNROLL
    for (int i = prim::thread_id() * kVec; i < whole; i += kThreads * kVec) {
      const V u = prim::load_global_vec<V>(grad + i), w = prim::load_global_vec<V>(out + i);
      int row = i / cols, col = i - row * cols;
      EFFVIT_UNROLL
      for (int e = 0; e < kVec; ++e) {
        to.store(row * kProductStride + col, prim::to_float(u.v[e]) * prim::to_float(w.v[e]));
        ++col;
        if (col == cols) ++row, col = 0;
      }
    }
    for (int i = whole + prim::thread_id(); i < count; i += kThreads) {
      const int row = i / cols;
      to.store(row * kProductStride + i - row * cols,
               prim::to_float(prim::load_global(grad + i)) * prim::to_float(prim::load_global(out + i)));
    }
    for (int i = rows * kTile + prim::thread_id(); i < kTile * kTile; i += kThreads)
      if (i % kTile < cols) to.store(i / kTile * kProductStride + i % kTile, 0.f);
    return;
  }
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id(); i < kTile * kTile; i += kThreads) {
    const int row = i / kTile, col = i % kTile;
    float y = 0.f;
    if (row < rows && col < cols)
      y = prim::to_float(prim::load_global(grad + row * grad_stride + col)) *
          prim::to_float(prim::load_global(out + row * out_stride + col));
    to.store(row * kProductStride + col, y);
  }
}
EFFVIT_DEVICE void clear_columns(const Shared<float>& products, int cols) {
  for (int i = prim::thread_id(); i < kTile * kTile; i += kThreads)
    if (i % kTile >= cols) products.store(i / kTile * kProductStride + i % kTile, 0.f);
}

// What a thread accumulates of a tile of dx: sums over j of P_ij, and of P_ij y_j for kTile columns.
template <class T, bool kTensorCores = Traits<T>::kTensorCores>
struct Gradient;

// The accumulators of mma: rows `row` and `row + 8`, columns column + 8 n, + 1.
template <class T>
struct Gradient<T, true> {
  float acc[kNTiles][4], sum[2];
  float scale[2];  // what P was multiplied by before it was rounded, a power of two

  static EFFVIT_DEVICE int row() { return prim::warp_id() * 16 + prim::lane_id() / 4; }
  static EFFVIT_DEVICE int column() { return prim::lane_id() % 4 * 2; }

  EFFVIT_DEVICE void clear() {
    EFFVIT_UNROLL
    for (int n = 0; n < kNTiles; ++n) {
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) acc[n][e] = 0.f;
    }
    sum[0] = sum[1] = 0.f;
    scale[0] = scale[1] = 1.15292150460684698e18f;  // 2^60
  }

  // Lowers the scale of a row so that its largest P lies in [2^14, 2^15), if it would be larger.
  EFFVIT_DEVICE void rescale(const float (&p)[kNTiles][4], int n_tiles) {
    EFFVIT_UNROLL
    for (int r = 0; r < 2; ++r) {
      float largest = 0.f;
      EFFVIT_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        EFFVIT_UNROLL
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          const float x = p[n][e] < 0.f ? -p[n][e] : p[n][e];
          if (n < n_tiles) largest = x > largest ? x : largest;
        }
      }
      largest = prim::warp_max<4>(largest);
      if (largest * scale[r] >= 32768.f) {
        // 2^(14 - e) for largest in [2^e, 2^(e + 1)); e is at least 15 - 60
        const uint32_t exponent = prim::bit_cast<uint32_t>(largest) >> 23;
        const float lower = prim::bit_cast<float>((127u + 14u + 127u - exponent) << 23);
        const float ratio = lower * (1.f / scale[r]);
        sum[r] *= ratio;
        EFFVIT_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
          acc[n][2 * r] *= ratio;
          acc[n][2 * r + 1] *= ratio;
        }
        scale[r] = lower;
      }
    }
  }

  // Adds the tile `products` (kTransposed: its transpose) times y. `depth` rows of y are used, cols of its columns.
  template <bool kTransposed>
  EFFVIT_DEVICE void add(const Shared<float>& products, const Shared<T>& y, int depth, int cols) {
    constexpr int kStride = Traits<T>::kStride;
    const int lane = prim::lane_id(), low = lane % 8, half = lane / 8 % 2 * 8, quarter = lane / 16 * 8;
    const int n_tiles = (depth + 15) / 16 * 2;
    float p[kNTiles][4];
    EFFVIT_UNROLL
    for (int n = 0; n < kNTiles; ++n) {
      if (n < n_tiles) {
        EFFVIT_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int i = row() + 8 * r, j = n * 8 + column();
          if constexpr (kTransposed) {
            p[n][2 * r] = products.load(j * kProductStride + i);
            p[n][2 * r + 1] = products.load((j + 1) * kProductStride + i);
          } else {
            const auto x = products.load_vec<Vec<float, 2>>(i * kProductStride + j);
            p[n][2 * r] = x.v[0];
            p[n][2 * r + 1] = x.v[1];
          }
        }
      } else {
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) p[n][e] = 0.f;
      }
    }
    if constexpr (Traits<T>::kScaled) {
      rescale(p, n_tiles);
      EFFVIT_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) p[n][e] *= scale[e / 2];
      }
    }
    EFFVIT_UNROLL
    for (int s = 0; s < kNTiles / 2; ++s) {
      if (2 * s < n_tiles) {
        uint32_t af[4];
        EFFVIT_UNROLL
        for (int f = 0; f < 4; ++f) {
          const int n = 2 * s + f / 2, e = f % 2 * 2;
          af[f] = prim::pack2<T>(p[n][e], p[n][e + 1]);
          sum[f % 2] +=
              prim::to_float(T{static_cast<uint16_t>(af[f])}) + prim::to_float(T{static_cast<uint16_t>(af[f] >> 16)});
        }
        EFFVIT_UNROLL
        for (int n = 0; n < kNTiles; n += 2) {
          if (n * 8 < cols) {
            uint32_t bf[4];
            prim::ldmatrix_x4<true>(bf, y, (s * 16 + low + half) * kStride + n * 8 + quarter);
            prim::mma_m16n8k16<T>(acc[n], af, bf[0], bf[1]);
            prim::mma_m16n8k16<T>(acc[n + 1], af, bf[2], bf[3]);
          }
        }
      }
    }
  }

  // f(row, column, x sum - acc at the column and its right neighbour) with x, the tile of kTile rows, in shared memory.
  template <class F>
  EFFVIT_DEVICE void finish(const Shared<T>& x, int cols, const F& f) const {
    EFFVIT_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float inverse = Traits<T>::kScaled ? 1.f / scale[r] : 1.f;
      const float total = prim::warp_sum<4>(sum[r]) * inverse;
      EFFVIT_UNROLL
      for (int n = 0; n < kNTiles; ++n) {
        const int i = row() + 8 * r, j = n * 8 + column();
        if (j < cols) {
          const auto v = x.template load_vec<Vec<T, 2>>(i * Traits<T>::kStride + j);
          f(i, j, prim::to_float(v.v[0]) * total - acc[n][2 * r] * inverse,
            prim::to_float(v.v[1]) * total - acc[n][2 * r + 1] * inverse);
        }
      }
    }
  }
};

// float32: rows FloatBlock::row() + i, columns 4 (thread % 8) + 32 n and the next three.
template <class T>
struct Gradient<T, false> {
  float acc[4][2][4], sum[4];

  static EFFVIT_DEVICE int column() { return prim::thread_id() % 8 * 4; }

  EFFVIT_DEVICE void clear() {
    EFFVIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      sum[i] = 0.f;
      EFFVIT_UNROLL
      for (int n = 0; n < 2; ++n) {
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) acc[i][n][e] = 0.f;
      }
    }
  }

  template <bool kTransposed>
  EFFVIT_DEVICE void add(const Shared<float>& products, const Shared<float>& y, int depth, int cols) {
    constexpr int kStride = Traits<float>::kStride;
    const int row = FloatBlock::row();
    EFFVIT_NO_UNROLL
    for (int k = 0; k < depth; k += 4) {
      Float4 a[4];  // kTransposed: [depth][row], else [row][depth]
      EFFVIT_UNROLL
      for (int i = 0; i < 4; ++i)
        a[i] = products.load_vec<Float4>(kTransposed ? (k + i) * kProductStride + row : (row + i) * kProductStride + k);
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) {
        float p[4];
        EFFVIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          p[i] = kTransposed ? a[e].v[i] : a[i].v[e];
          sum[i] += p[i];
        }
        EFFVIT_UNROLL
        for (int n = 0; n < 2; ++n) {
          if (n * 32 < cols) {
            const Float4 b = y.load_vec<Float4>((k + e) * kStride + column() + 32 * n);
            EFFVIT_UNROLL
            for (int i = 0; i < 4; ++i) {
              EFFVIT_UNROLL
              for (int c = 0; c < 4; ++c) acc[i][n][c] += p[i] * b.v[c];
            }
          }
        }
      }
    }
  }

  template <class F>
  EFFVIT_DEVICE void finish(const Shared<float>& x, int cols, const F& f) const {
    EFFVIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      EFFVIT_UNROLL
      for (int n = 0; n < 2; ++n) {
        if (n * 32 < cols) {
          const int row = FloatBlock::row() + i, col = column() + 32 * n;
          const Float4 v = x.load_vec<Float4>(row * Traits<float>::kStride + col);
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
EFFVIT_DEVICE void store_gradient(const Plan& g, const Gradient<T>& gradient, const Shared<T>& x, T* to, int rows,
                                  int cols, bool aligned) {
  constexpr int kVec = Traits<T>::kVec, kStride = Traits<T>::kStride;
  const float factor = -2.f * g.p.gamma;
  gradient.finish(x, round_up(cols, Traits<T>::kBackwardPad), [&](int row, int col, float low, float high) {
    store_pair(x, row * kStride + col, factor * low, factor * high);
  });
  prim::sync_warp();
  const int row0 = prim::warp_id() * 16, chunks = (cols + kVec - 1) / kVec;
  const int64_t row_elements = g.p.H * g.p.D;
  EFFVIT_NO_UNROLL
  for (int i = prim::lane_id(); i < 16 * chunks; i += prim::kWarpSize) {
    const int row = row0 + i / chunks, col = i % chunks * kVec;
    if (row >= rows) break;
    T* const at = to + row * row_elements + col;
    if (aligned && col + kVec <= cols) {
      prim::store_global_vec(at, x.template load_vec<Vec<T, kVec>>(row * kStride + col));
    } else {
      for (int e = 0; e < kVec && col + e < cols; ++e) prim::store_global(at + e, x.load(row * kStride + col + e));
    }
  }
}

template <class T>
struct BackwardTile {
  static constexpr int kElements = kTile * Traits<T>::kStride;
  static constexpr int kBytes = kElements * static_cast<int>(sizeof(T));
  static constexpr int kSharedBytes = 2 * kBytes + kTile * kProductStride * 4;

  Shared<T> q, k;
  Shared<float> products;

  EFFVIT_DEVICE BackwardTile() : q(0, kElements), k(kBytes, kElements), products(2 * kBytes, kTile * kProductStride) {}

  EFFVIT_DEVICE void load_p(const Plan& g, int64_t b, int64_t h, int64_t qt, int64_t kt, int queries, int keys) const {
    const auto& p = g.p;
    load_products(g, products,
                  static_cast<const T*>(p.grad_out) + b * p.grad_out_stride_b + h * p.grad_out_stride_h +
                      qt * kTile * p.grad_out_stride_l + kt * kTile,
                  static_cast<const T*>(p.out) + ((b * p.H + h) * p.L + qt * kTile) * p.M + kt * kTile, queries, keys);
  }
};

// dq: a CTA owns a tile of queries and a chunk of columns, and walks over the keys.
template <class T>
EFFVIT_KERNEL(kThreads, 3)
rbf_gram_bwd_dq_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const BackwardTile<T> tile;
  EFFVIT_NO_UNROLL
  for (int64_t unit = prim::cta_id(); unit < g.units; unit += prim::cta_count()) {
    const int first = static_cast<int>(unit % g.col_chunks) * kTile;
    const int64_t qt = unit / g.col_chunks % g.q_tiles, bh = unit / g.col_chunks / g.q_tiles;
    const int64_t b = bh / g.p.H, h = bh - b * g.p.H;
    const Rows<T> from_q = q_rows<T>(g, b, h, qt);
    const int cols = min_of(kTile, g.d_pad - first);
    const bool has_rows = prim::warp_id() * 16 < from_q.valid;
    Gradient<T> dq;
    dq.clear();
    EFFVIT_NO_UNROLL
    for (int64_t kt = 0; kt < g.k_tiles; ++kt) {
      const Rows<T> from_k = k_rows<T>(g, b, h, kt);
      prim::sync_threads();  // the previous tiles' readers
      if (kt == 0) {
        load_rows(tile.q, from_q, first, cols);
        if (g.access == kFlatVectors) clear_columns(tile.products, from_k.valid);
      }
      load_rows(tile.k, from_k, first, cols);
      prim::cp_async_commit();
      tile.load_p(g, b, h, qt, kt, from_q.valid, from_k.valid);
      prim::cp_async_wait<0>();
      prim::sync_threads();
      if (has_rows) dq.template add<false>(tile.products, tile.k, from_k.valid, cols);
    }
    if (has_rows)
      store_gradient(g, dq, tile.q, static_cast<T*>(g.p.dq) + ((b * g.p.L + qt * kTile) * g.p.H + h) * g.p.D + first,
                     from_q.valid, min_of(kTile, static_cast<int>(g.p.D) - first), g.dq_vec);
  }
}

// dk: a CTA owns a tile of keys and a chunk of columns, and walks over a piece of the queries. kWithDq: there is one
// tile of keys, and dq is computed on the way.
template <class T, bool kWithDq>
EFFVIT_KERNEL(kThreads, 3)
rbf_gram_bwd_dk_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const BackwardTile<T> tile;
  EFFVIT_NO_UNROLL
  for (int64_t unit = prim::cta_id(); unit < g.units; unit += prim::cta_count()) {
    int64_t i = unit;
    const int first = static_cast<int>(i % g.col_chunks) * kTile;
    i /= g.col_chunks;
    const int64_t kt = i % g.k_tiles;
    i /= g.k_tiles;
    const int64_t heads = g.p.B * g.p.H, bh = i % heads, split = i / heads;
    const int64_t b = bh / g.p.H, h = bh - b * g.p.H;
    const Rows<T> from_k = k_rows<T>(g, b, h, kt);
    const int cols = min_of(kTile, g.d_pad - first), out_cols = min_of(kTile, static_cast<int>(g.p.D) - first);
    const bool has_keys = prim::warp_id() * 16 < from_k.valid;
    const int64_t begin = split * g.split_tiles;
    const int64_t end = begin + g.split_tiles < g.q_tiles ? begin + g.split_tiles : g.q_tiles;
    Gradient<T> dk;
    dk.clear();
    EFFVIT_NO_UNROLL
    for (int64_t qt = begin; qt < end; ++qt) {
      const Rows<T> from_q = q_rows<T>(g, b, h, qt);
      prim::sync_threads();  // the previous tiles' readers
      if (qt == begin) {
        load_rows(tile.k, from_k, first, cols);
        if (g.access == kFlatVectors) clear_columns(tile.products, from_k.valid);
      }
      load_rows(tile.q, from_q, first, cols);
      prim::cp_async_commit();
      tile.load_p(g, b, h, qt, kt, from_q.valid, from_k.valid);
      prim::cp_async_wait<0>();
      prim::sync_threads();
      if (has_keys) dk.template add<true>(tile.products, tile.q, from_q.valid, cols);
      if constexpr (kWithDq) {
        const bool has_queries = prim::warp_id() * 16 < from_q.valid;
        Gradient<T> dq;
        dq.clear();
        if (has_queries) dq.template add<false>(tile.products, tile.k, from_k.valid, cols);
        prim::sync_threads();  // the readers of q, over which dq is computed
        if (has_queries)
          store_gradient(g, dq, tile.q,
                         static_cast<T*>(g.p.dq) + ((b * g.p.L + qt * kTile) * g.p.H + h) * g.p.D + first, from_q.valid,
                         out_cols, g.dq_vec);
      }
    }
    if (!has_keys) continue;
    if (g.splits == 1) {
      // In place over k, whose readers are done: dq was followed by a barrier, and dk alone does not read k.
      store_gradient(g, dk, tile.k, static_cast<T*>(g.p.dk) + ((b * g.p.M + kt * kTile) * g.p.H + h) * g.p.D + first,
                     from_k.valid, out_cols, g.dk_vec);
    } else {
      float* const to = g.partials + ((split * heads + bh) * g.p.M + kt * kTile) * g.partial_stride + first;
      dk.finish(tile.k, round_up(out_cols, 2), [&](int row, int col, float low, float high) {
        if (row < from_k.valid && col < out_cols)
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
    const int64_t d = i % p.D, h = i / p.D % p.H, bm = i / p.D / p.H, b = bm / p.M, m = bm - b * p.M;
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
  const int64_t size = sizeof(T);
  Plan g = {};
  g.p = p;
  g.q_tiles = ceil_div(p.L, kTile);
  g.k_tiles = ceil_div(p.M, kTile);
  g.d_pad = round_up(p.D, backward ? Traits<T>::kBackwardPad : Traits<T>::kPad);
  g.col_chunks = static_cast<int32_t>(ceil_div(p.D, kTile));
  g.q_vec = aligned16(p.q, size, {p.q_stride_b, p.q_stride_l, p.q_stride_h});
  g.k_vec = aligned16(p.k, size, {p.k_stride_b, p.k_stride_l, p.k_stride_h});
  g.access = matrix_access<T>(p, backward);
  g.splits = 1;
  g.split_tiles = g.q_tiles;
  return g;
}

template <class T>
Plan forward_plan(const RbfGramParams& p) {
  Plan g = make_plan<T>(p, false);
  g.units = p.B * p.H * g.q_tiles * g.k_tiles;
  return g;
}

template <class T>
Plan dq_plan(const RbfGramParams& p) {
  Plan g = make_plan<T>(p, true);
  g.dq_vec = aligned16(p.dq, sizeof(T), {p.D});
  g.units = p.B * p.H * g.q_tiles * g.col_chunks;
  return g;
}

// As many pieces as make target_ctas() CTAs, at most kMaxSplits.
template <class T>
Plan dk_plan(const RbfGramParams& p, void* workspace) {
  Plan g = dq_plan<T>(p);
  g.dk_vec = aligned16(p.dk, sizeof(T), {p.D});
  const int64_t tiles = p.B * p.H * g.k_tiles * g.col_chunks;
  int64_t splits = ceil_div(prim::target_ctas(), tiles);
  splits = splits < kMaxSplits ? splits : kMaxSplits;
  g.split_tiles = ceil_div(g.q_tiles, splits);
  g.splits = static_cast<int32_t>(ceil_div(g.q_tiles, g.split_tiles));
  g.units = tiles * g.splits;
  g.partial_stride = round_up(p.D, 2);
  g.partials = static_cast<float*>(workspace);
  return g;
}

inline int64_t grid_size(int64_t units) { return units < prim::target_ctas() ? units : prim::target_ctas(); }

template <class T>
size_t workspace_bytes(const RbfGramParams& p) {
  const Plan g = dk_plan<T>(p, nullptr);
  return g.splits == 1 ? 0 : static_cast<size_t>(g.splits * p.B * p.H * p.M * g.partial_stride) * sizeof(float);
}

template <class T>
int64_t forward_shared_bytes() {
  return 2 * kTile * Traits<T>::kStride * static_cast<int64_t>(sizeof(T)) +
         (Traits<T>::kTensorCores ? 2 * kTile * 4 : 0);
}

inline bool is_empty(const RbfGramParams& p) { return p.B * p.H == 0 || p.L == 0 || p.M == 0; }

// Bytes from the first to the last element of a tensor of four dims with last stride 1.
inline uint64_t extent_bytes(const RbfGramParams& p, int64_t rows, int64_t cols, int64_t b, int64_t row, int64_t h) {
  return static_cast<uint64_t>(((p.B - 1) * b + (rows - 1) * row + (p.H - 1) * h + cols) * element_bytes(p.dtype));
}

inline void register_inputs(prim::GlobalRanges& ranges, const RbfGramParams& p) {
  ranges.read(p.q, extent_bytes(p, p.L, p.D, p.q_stride_b, p.q_stride_l, p.q_stride_h));
  ranges.read(p.k, extent_bytes(p, p.M, p.D, p.k_stride_b, p.k_stride_l, p.k_stride_h));
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
  ranges.write_once(p.out, static_cast<uint64_t>(p.B * p.H * p.L * p.M * element_bytes(p.dtype)));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    const Plan g = forward_plan<T>(p);
    return EFFVIT_LAUNCH((rbf_gram_fwd_kernel<T>), grid_size(g.units), kThreads, forward_shared_bytes<T>(), stream, g);
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
  const int64_t size = element_bytes(p.dtype);
  prim::GlobalRanges ranges;
  register_inputs(ranges, p);
  ranges.read(p.out, static_cast<uint64_t>(p.B * p.H * p.L * p.M * size));
  ranges.read(p.grad_out, extent_bytes(p, p.L, p.M, p.grad_out_stride_b, p.grad_out_stride_l, p.grad_out_stride_h));
  ranges.write(workspace, rbf_gram_bwd_workspace_bytes<Types>(p));
  ranges.write_once(p.dq, static_cast<uint64_t>(p.B * p.L * p.H * p.D * size));
  ranges.write_once(p.dk, static_cast<uint64_t>(p.B * p.M * p.H * p.D * size));
  const cudaError_t error = dispatch_dtype<Types>(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kBytes = BackwardTile<T>::kSharedBytes;
    const Plan dk = dk_plan<T>(p, workspace);
    cudaError_t status;
    if (dk.k_tiles == 1) {
      status = EFFVIT_LAUNCH((rbf_gram_bwd_dk_kernel<T, true>), grid_size(dk.units), kThreads, kBytes, stream, dk);
    } else {
      const Plan dq = dq_plan<T>(p);
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
