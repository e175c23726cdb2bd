// float32 products in register blocks, for kernels whose CTAs own blocks of a result rather than rows of warps: a
// thread has 4 rows and kN groups of 4 neighbouring columns, and reads both operands 16 bytes at a time.
#pragma once
#include "tile.cuh"

namespace effvit {
namespace cuda {
namespace tile {

using Float4 = Vec<float, 4>;
template <int kN>
using Block = float[4][kN][4];  // row, group, column of the group

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

// acc += A B: rows [row, row + 4) of A, stored [m][k], or [k][m] with kTransposed, and columns col + n * col_step of B,
// stored [k][n], where n * col_step < cols. depth is a multiple of 4. visit(i, x) sees each element of the rows of A.
template <bool kTransposed, int kN, class Visit>
EFFVIT_DEVICE void block_product(float (&acc)[4][kN][4], const Shared<float>& a, int a_stride, int row,
                                 const Shared<float>& b, int b_stride, int col, int col_step, int cols, int depth,
                                 const Visit& visit) {
  EFFVIT_NO_UNROLL
  for (int k = 0; k < depth; k += 4) {
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
}

}  // namespace tile
}  // namespace cuda
}  // namespace effvit
