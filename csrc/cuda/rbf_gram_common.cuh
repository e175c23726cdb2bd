// What both passes of rbf_gram share: the plan, tiles of tokens and of a matrix. See rbf_gram.cuh.
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

// A thread of the float32 kernels owns rows 4 (thread / 8) + i of a tile and eight of its columns.
EFFVIT_DEVICE int block_row() { return prim::thread_id() / 8 * 4; }

}  // namespace rbf_gram_impl
}  // namespace cuda
}  // namespace effvit
