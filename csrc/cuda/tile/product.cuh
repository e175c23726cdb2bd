// Matrix products of tiles: acc += A B for the 16 rows of A that a warp owns.
//
//   product        A and B in shared memory
//   score_product  A in the accumulators of another product: attention's P V
//
// 16-bit formats run on the tensor cores. float32 does without, in the same layout of accumulators, so that everything
// around a product is written once.
#pragma once
#include "tile.cuh"

namespace effvit {
namespace cuda {
namespace tile {

// How an operand lies in its tile. kDepthLast: A [m][k], B [n][k]; kDepthFirst: A [k][m], B [k][n].
enum Stored : bool { kDepthLast, kDepthFirst };

// What becomes of a fragment of A on its way to the tensor cores. A map is a functor (hi, lo) that receives elements as
// they are in memory and leaves them in the tile's format.
struct Unmapped {};

// The lane's address in a 16x16 block for ldmatrix: matrices side by side first, or one below the other first.
struct Ldmatrix {
  int low = prim::lane_id() % 8, half = prim::lane_id() / 8 % 2 * 8, quarter = prim::lane_id() / 16 * 8;
};

template <Stored kA, class F, class Map>
EFFVIT_DEVICE void load_fragment(uint32_t (&hi)[4], uint32_t (&lo)[4], const Operand<F>& a, int k, const Map& map) {
  const Ldmatrix at;
  const int i = kA == kDepthFirst ? (a.row + k + at.low + at.quarter) * a.tile.stride + a.col + at.half
                                  : (a.row + at.low + at.half) * a.tile.stride + a.col + k + at.quarter;
  prim::ldmatrix_x4<kA == kDepthFirst>(hi, a.tile.hi, i);
  if constexpr (!std::is_same<Map, Unmapped>::value) {
    map(hi, lo);
  } else if constexpr (F::kSplit) {
    prim::ldmatrix_x4<kA == kDepthFirst>(lo, a.tile.lo, i);
  }
}

// One step: A's 16 columns times B's 16 from depth k on. Tile n of the product goes to acc[first + n].
template <Stored kB, class F, int kN>
EFFVIT_DEVICE void fragment_product(float (&acc)[kN][4], int first, int n_tiles, const uint32_t (&hi)[4],
                                    const uint32_t (&lo)[4], const Operand<F>& b, int k) {
  static_assert(kN % 2 == 0, "B is loaded for two tiles at a time");
  using E = typename F::Element;
  const Ldmatrix at;
  EFFVIT_UNROLL
  for (int i = 0; i < kN; i += 2) {
    const int n = i - first;
    if (n >= 0 && n < n_tiles) {
      const bool both = F::kEvenTiles || n + 1 < n_tiles;
      const int bi = kB == kDepthFirst ? (b.row + k + at.low + at.half) * b.tile.stride + b.col + n * 8 + at.quarter
                                       : (b.row + n * 8 + at.low + at.quarter) * b.tile.stride + b.col + k + at.half;
      uint32_t bf[4];
      prim::ldmatrix_x4<kB == kDepthFirst>(bf, b.tile.hi, bi);
      prim::mma_m16n8k16<E>(acc[i], hi, bf[0], bf[1]);
      if (both) prim::mma_m16n8k16<E>(acc[i + 1], hi, bf[2], bf[3]);
      if constexpr (F::kSplit) {
        prim::mma_m16n8k16<E>(acc[i], lo, bf[0], bf[1]);
        if (both) prim::mma_m16n8k16<E>(acc[i + 1], lo, bf[2], bf[3]);
        prim::ldmatrix_x4<kB == kDepthFirst>(bf, b.tile.lo, bi);
        prim::mma_m16n8k16<E>(acc[i], hi, bf[0], bf[1]);
        if (both) prim::mma_m16n8k16<E>(acc[i + 1], hi, bf[2], bf[3]);
      }
    }
  }
}

// float32 of this lane's two rows and n_tiles * 8 columns, four of the depth at a time.
template <Stored kA, Stored kB, class F, int kN>
EFFVIT_DEVICE void float_product(float (&acc)[kN][4], int n_tiles, const Operand<F>& a, const Operand<F>& b,
                                 int depth) {
  using V4 = Vec<float, 4>;
  const int row = prim::lane_id() / 4, col = acc_col(), as = a.tile.stride, bs = b.tile.stride;
  EFFVIT_NO_UNROLL
  for (int k = 0; k < depth; k += 4) {
    V4 x[2];
    if constexpr (kA == kDepthFirst) {
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) {
        x[0].v[e] = a.tile.hi.load((a.row + k + e) * as + a.col + row);
        x[1].v[e] = a.tile.hi.load((a.row + k + e) * as + a.col + row + 8);
      }
    } else {
      x[0] = a.tile.hi.template load_vec<V4>((a.row + row) * as + a.col + k);
      x[1] = a.tile.hi.template load_vec<V4>((a.row + row + 8) * as + a.col + k);
    }
    EFFVIT_UNROLL
    for (int n = 0; n < kN; ++n) {
      if (n < n_tiles) {
        V4 y[2];
        if constexpr (kB == kDepthFirst) {
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) {
            const auto pair = b.tile.hi.template load_vec<Vec<float, 2>>((b.row + k + e) * bs + b.col + n * 8 + col);
            y[0].v[e] = pair.v[0];
            y[1].v[e] = pair.v[1];
          }
        } else {
          y[0] = b.tile.hi.template load_vec<V4>((b.row + n * 8 + col) * bs + b.col + k);
          y[1] = b.tile.hi.template load_vec<V4>((b.row + n * 8 + col + 1) * bs + b.col + k);
        }
        EFFVIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) {
            const V4 &u = x[e / 2], &w = y[e % 2];
            if constexpr (!F::kFreshSums) {
              acc[n][e] += u.v[i] * w.v[i];
            } else if (i == 0) {
              acc[n][e] += (u.v[0] * w.v[0] + u.v[1] * w.v[1]) + (u.v[2] * w.v[2] + u.v[3] * w.v[3]);
            }
          }
        }
      }
    }
  }
}

// acc[first + n] += A B for 16 rows of A and columns 8 n of B, n < n_tiles, over `depth`: a multiple of 16, of 4 in
// float32. With kFreshSums float32 starts every sum over the depth from zero and adds it once: a sum over a long
// sequence, added up term by term, would lose bits.
template <Stored kA, Stored kB, class F, int kN, class Map = Unmapped>
EFFVIT_DEVICE void product(float (&acc)[kN][4], int n_tiles, const Operand<F>& a, const Operand<F>& b, int depth,
                           int first = 0, const Map& map = {}) {
  if constexpr (kTensorCores<typename F::Element>) {
    EFFVIT_NO_UNROLL
    for (int k = 0; k < depth; k += 16) {
      uint32_t hi[4], lo[4];
      load_fragment<kA>(hi, lo, a, k, map);
      fragment_product<kB>(acc, first, n_tiles, hi, lo, b, k);
    }
  } else if constexpr (F::kFreshSums) {
    EFFVIT_UNROLL
    for (int i = 0; i < kN; i += 2) {
      if (i < first || i >= first + n_tiles) continue;
      const int n = (i - first) * 8;
      float sum[2][4] = {};
      float_product<kA, kB>(sum, 2, a, kB == kDepthFirst ? b.tile.at(b.row, b.col + n) : b.tile.at(b.row + n, b.col),
                            depth);
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) acc[i][e] += sum[0][e], acc[i + 1][e] += sum[1][e];
    }
  } else {
    float_product<kA, kB>(acc, n_tiles, a, b, depth);
  }
}

// acc += P B, P in the accumulators p[0] to p[depth / 8 - 1] of this warp's rows; B is stored [k][n]. float32 takes the
// way through the warp's rows of `stage`, whose columns hold the depth.
template <class F, int kN, int kP>
EFFVIT_DEVICE void score_product(float (&acc)[kN][4], int n_tiles, const float (&p)[kP][4], const Operand<F>& b,
                                 int depth, const Tile<F>& stage) {
  if constexpr (kTensorCores<typename F::Element>) {
    EFFVIT_UNROLL
    for (int s = 0; s < kP / 2; ++s) {
      if (s * 16 < depth) {
        uint32_t hi[4], lo[4];
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) {
          const float (&c)[4] = p[2 * s + e / 2];
          pack_pair<F>(c[e % 2 * 2], c[e % 2 * 2 + 1], hi[e], lo[e]);
        }
        fragment_product<kDepthFirst>(acc, 0, n_tiles, hi, lo, b, s * 16);
      }
    }
  } else {
    prim::sync_warp();  // the previous product's readers
    store_acc(stage, 0, p, (depth + 7) / 8);
    prim::sync_warp();
    product<kDepthLast, kDepthFirst>(acc, n_tiles, stage.at(warp_row(), 0), b, depth);
  }
}

}  // namespace tile
}  // namespace cuda
}  // namespace effvit
