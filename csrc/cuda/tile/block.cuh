// float32 products in register blocks, for kernels whose CTAs own blocks of a result rather than rows of warps: a
// thread has 4 rows and kN groups of 4 neighbouring columns, and reads both operands 16 bytes at a time.
#pragma once
#include "tile.cuh"

namespace effvit {
namespace cuda {
namespace tile {

using Float4 = Vec<float, 4>;

// f(i, n, c) for the accumulators acc[i][n][c]: row, group, column of the group.
template <int kN, class F>
EFFVIT_DEVICE void for_each_block(const F& f) {
  EFFVIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    EFFVIT_UNROLL
    for (int n = 0; n < kN; ++n) {
      EFFVIT_UNROLL
      for (int c = 0; c < 4; ++c) f(i, n, c);
    }
  }
}

// acc += A B over the depth from k to k + 3: rows [row, row + 4) of A, stored [m][k], or [k][m] with kTransposed, and
// columns col + n * col_step of B, stored [k][n], where n * col_step < cols. visit(i, x) sees each element of row i of
// A.
template <bool kTransposed, int kN, class Visit>
EFFVIT_DEVICE void block_step(float (&acc)[4][kN][4], int k, const Shared<float>& a, int a_stride, int row,
                              const Shared<float>& b, int b_stride, int col, int col_step, int cols,
                              const Visit& visit) {
  Float4 x[4];
  EFFVIT_UNROLL
  for (int i = 0; i < 4; ++i)
    x[i] = a.load_vec<Float4>(kTransposed ? (k + i) * a_stride + row : (row + i) * a_stride + k);
  EFFVIT_UNROLL
  for (int e = 0; e < 4; ++e) {
    float p[4];
    EFFVIT_UNROLL
    for (int i = 0; i < 4; ++i) {
      p[i] = kTransposed ? x[e].v[i] : x[i].v[e];
      visit(i, p[i]);
    }
    EFFVIT_UNROLL
    for (int n = 0; n < kN; ++n) {
      if (n * col_step < cols) {
        const Float4 y = b.load_vec<Float4>((k + e) * b_stride + col + n * col_step);
        EFFVIT_UNROLL
        for (int i = 0; i < 4; ++i) {
          EFFVIT_UNROLL
          for (int c = 0; c < 4; ++c) acc[i][n][c] += p[i] * y.v[c];
        }
      }
    }
  }
}

}  // namespace tile
}  // namespace cuda
}  // namespace effvit
