// What the kernels of the int8 products share: tiles of operands on their way to shared memory, and the size of tiles.
#pragma once
#include "int8_epilogue.cuh"
#include "tile/product.cuh"

namespace effvit {
namespace cuda {
namespace int8_impl {

struct Matrix {
  const int8_t* base;  // [rows, cols], last stride 1
  int64_t rows, stride;
  int32_t cols;
  bool vec;  // every row starts at a multiple of 16 bytes
};

inline Matrix make_matrix(const void* base, int64_t rows, int64_t cols, int64_t stride) {
  return {static_cast<const int8_t*>(base), rows, stride, static_cast<int32_t>(cols), aligned16(base, 1, {stride})};
}

// Starts to copy kRows rows and kCols columns from (row, col) on; kFill beyond the matrix, which is for operands whose
// pieces are whole where they are aligned. A cp_async_commit must follow. What is not aligned goes through registers,
// in a loop that is kept short: it would outweigh the rest of a kernel.
template <int kRows, int kCols, int kStride, int kThreads, uint8_t kFill = 0>
EFFVIT_DEVICE void load_tile(const Shared<int8_t>& to, const Matrix& from, int64_t row, int col) {
  constexpr int kPieces = kCols / kVec<int8_t>, kCount = kRows * kPieces;
  const auto copy = [&](int i, bool vec) {
    if (kCount % kThreads != 0 && i >= kCount) return;
    const int r = i / kPieces, c = i % kPieces * kVec<int8_t>, at = r * kStride + c;
    const int n = piece_length<int8_t>(row + r < from.rows ? from.cols - col - c : 0);
    const int8_t* const p = from.base + (row + r) * from.stride + col + c;
    if (vec && (kFill == 0 || n != 0)) {
      prim::cp_async16(to, at, p, n);
    } else {
      Piece<int8_t> x;
      EFFVIT_UNROLL
      for (int e = 0; e < kVec<int8_t>; ++e)
        x.v[e] = !vec && e < n ? prim::load_global(p + e) : static_cast<int8_t>(kFill);
      to.store_vec(at, x);
    }
  };
  if (from.vec) {
    EFFVIT_UNROLL
    for (int i = 0; i < kCount; i += kThreads) copy(i + prim::thread_id(), true);
  } else {
    EFFVIT_NO_UNROLL
    for (int i = 0; i < kCount; i += kThreads) copy(i + prim::thread_id(), false);
  }
}

// Rows of x that a tile takes: 128 (and as many channels), 64 (likewise) or 16 (and 64). The largest that the result
// fills by more than half and that occupies the GPU: every multiprocessor with large tiles, every other one with medium
// ones.
inline int tile_rows(int64_t M, int64_t N) {
  const int64_t multiprocessors = prim::target_ctas() / 8;
  if (M > 64 && N > 64 && ceil_div(M, 128) * ceil_div(N, 128) >= multiprocessors) return 128;
  return M > 16 && ceil_div(M, 64) * ceil_div(N, 64) >= multiprocessors / 2 ? 64 : 16;
}

}  // namespace int8_impl
}  // namespace cuda
}  // namespace effvit
