// Rows between global memory and tiles, in pieces of 16 bytes: vectors and cp.async where they are aligned, element by
// element elsewhere, zeros beyond what there is.
//
// Every loader and storer here deals the pieces of a tile out alike: a warp has its own 16 rows. So a thread may work
// on the pieces that it copied after its own cp_async_wait, and a warp on its rows after a sync_warp; only who reads
// rows of other warps needs a barrier.
#pragma once
#include "tile.cuh"

namespace effvit {
namespace cuda {
namespace tile {

// Elements of a piece that exist where `left` do.
template <class T>
EFFVIT_DEVICE int piece_length(int left) {
  return left < 0 ? 0 : left > kVec<T> ? kVec<T> : left;
}

// The first n elements from `from`, then zeros. vec: `from` is a multiple of 16 bytes.
template <class T>
EFFVIT_DEVICE Piece<T> load_piece(const T* from, int n, bool vec) {
  if (n == kVec<T> && vec) return prim::load_global_vec<Piece<T>>(from);
  Piece<T> x;
  EFFVIT_UNROLL
  for (int e = 0; e < kVec<T>; ++e) x.v[e] = e < n ? prim::load_global(from + e) : T{};
  return x;
}
template <class T>
EFFVIT_DEVICE void store_piece(T* to, const Piece<T>& x, int n, bool vec) {
  if (n >= kVec<T> && vec) {
    prim::store_global_vec(to, x);
  } else {
    EFFVIT_UNROLL
    for (int e = 0; e < kVec<T>; ++e) {
      if (e < n) prim::store_global(to + e, x.v[e]);
    }
  }
}
// Into shared memory, left in flight where the piece is aligned.
template <class T, class E>
EFFVIT_DEVICE void copy_piece(const Shared<E>& to, int i, const T* from, int n, bool vec) {
  if (n != 0 && vec) {
    prim::cp_async16(to, i, from, n * static_cast<int>(sizeof(T)));
  } else {
    to.store_vec(i, load_piece(from, n, vec));
  }
}

template <class T>
EFFVIT_DEVICE void to_floats(const Piece<T>& x, float (&y)[kVec<T>]) {
  EFFVIT_UNROLL
  for (int e = 0; e < kVec<T>; ++e) y[e] = prim::to_float(x.v[e]);
}

// f(row, col) for each piece that this thread owns of a tile with `pieces` pieces a row.
template <class T, class F>
EFFVIT_DEVICE void for_each_piece(int pieces, const F& f) {
  EFFVIT_NO_UNROLL
  for (int i = prim::lane_id(); i < 16 * pieces; i += prim::kWarpSize) {
    const int row = i / pieces, piece = i - row * pieces;
    f(warp_row() + row, piece * kVec<T>);
  }
}
// The same pieces where a row has 1 << shift of them.
template <class T, class F>
EFFVIT_DEVICE void for_each_shifted_piece(int shift, const F& f) {
  EFFVIT_NO_UNROLL
  for (int i = prim::lane_id(); i < 16 << shift; i += prim::kWarpSize)
    f(warp_row() + (i >> shift), (i & ((1 << shift) - 1)) * kVec<T>);
}
// And where these are 32 at most, so that all of a thread's are at one column: it stays in a register.
template <class T>
EFFVIT_DEVICE int piece_col(int shift) {
  return (prim::lane_id() & ((1 << shift) - 1)) * kVec<T>;
}
template <class F>
EFFVIT_DEVICE void for_each_piece_row(int shift, const F& f) {
  const int last = warp_row() + 16;
  EFFVIT_NO_UNROLL
  for (int row = warp_row() + (prim::lane_id() >> shift); row < last; row += prim::kWarpSize >> shift) f(row);
}
// Over the threads that hold the pieces of one row.
EFFVIT_DEVICE float row_sum(float x, int shift) {
  for (int m = (1 << shift) / 2; m > 0; m /= 2) x += prim::shuffle_xor(x, m);
  return x;
}

// Rows [B, L, H, dim] of a tensor, last stride 1; strides in elements. plan.cuh fills it.
struct Tokens {
  const void* base;
  int64_t stride_b, stride_l, stride_h;
  int32_t dim;
  bool vec;  // every row is a multiple of 16 bytes
};
template <class T>
EFFVIT_DEVICE const T* token_row(const Tokens& from, int64_t b, int64_t token, int64_t head) {
  return static_cast<const T*>(from.base) + b * from.stride_b + token * from.stride_l + head * from.stride_h;
}

// A row in global memory: `cols` elements from `at` on exist, the rest are zeros. vec: `at` is a multiple of 16 bytes.
template <class T>
struct Row {
  const T* at;
  int cols;
  bool vec;
};

// Starts to copy `cols` columns (whole pieces) of 64 rows; row_at(row) is a Row. A cp_async_commit must follow.
template <class F, class RowAt>
EFFVIT_DEVICE void load_rows(const Tile<F>& to, int cols, const RowAt& row_at) {
  using T = typename F::Memory;
  for_each_piece<T>(cols / kVec<T>, [&](int row, int col) {
    const Row<T> from = row_at(row);
    copy_piece(to.hi, row * to.stride + col, from.at + col, piece_length<T>(from.cols - col), from.vec);
  });
}

// Writes `cols` columns of this warp's 16 rows; to_row(row) is where, or null. A sync_warp must come between the rows'
// writers and this.
template <class T, class RowAt>
EFFVIT_DEVICE void store_rows(const Tile<Native<T>>& from, int cols, bool vec, const RowAt& to_row) {
  for_each_piece<T>((cols + kVec<T> - 1) / kVec<T>, [&](int row, int col) {
    T* const to = to_row(row);
    if (to != nullptr)
      store_piece(to + col, from.hi.template load_vec<Piece<T>>(row * from.stride + col), cols - col, vec);
  });
}

}  // namespace tile
}  // namespace cuda
}  // namespace effvit
