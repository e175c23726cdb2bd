// Tiles in shared memory and accumulators in registers: what lies where, and which thread owns it.
//
// Kernels with matrix products run CTAs of four warps on tiles of up to 64 rows. A warp owns 16 rows of a result; of
// these a lane has rows acc_row() and acc_row() + 8, and of every 8 columns acc_col() and the next: the layout of
// mma.m16n8k16, which float32 kernels share.
//
//   Format    how numbers of a tensor become operands: Native as they are in memory, Wide with the range of float32
//   Tile      rows of operands in shared memory, an odd multiple of 16 bytes apart; tile.at(row, col) is an Operand
//   Acc<kN>   accumulators of 16 rows and kN * 8 columns a warp: acc[n][0], [1] of row acc_row(), [2], [3] of the other
//
// rows.cuh moves rows between tiles and global memory, product.cuh multiplies tiles, block.cuh multiplies float32 with
// CTAs of any size, plan.cuh is the host's part: places in shared memory, splits of the work, extents of tensors.
#pragma once
#include "../common.cuh"

namespace effvit {
namespace cuda {
namespace tile {

using prim::Shared;
using prim::Vec;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / prim::kWarpSize;
constexpr int kTile = 64;  // rows of a tile, and columns of most
constexpr int kTiles = kTile / 8;  // accumulator tiles of 8 columns
constexpr float kLog2e = 1.4426950408889634f;
static_assert(kTile == 16 * kWarps, "a warp owns 16 rows of a tile");
static_assert(kThreads == 2 * kTile, "two threads share a row where rows are summed up");

template <class T>
constexpr bool kTensorCores = !std::is_same<T, float>::value;
template <class T>
constexpr int kVec = 16 / sizeof(T);  // elements of a piece: 16 bytes, what one access moves
template <class T>
using Piece = Vec<T, kVec<T>>;

// Elements from row to row of a tile. Where that is an odd multiple of 16 bytes, ldmatrix has no bank conflicts.
template <class T>
EFFVIT_HD constexpr int row_stride(int cols) {
  return cols + kVec<T>;
}
template <class T>
EFFVIT_HD constexpr int64_t tile_bytes(int rows, int cols) {
  return static_cast<int64_t>(rows) * row_stride<T>(cols) * static_cast<int64_t>(sizeof(T));
}
template <class T>
constexpr bool conflict_free(int cols) {
  return row_stride<T>(cols) * sizeof(T) / 16 % 2 == 1;
}
static_assert(conflict_free<float>(8) && conflict_free<prim::bfloat16>(16), "tiles are padded to 32 bytes a row");

// ---- formats ----

template <class T>
struct Native {
  using Memory = T;
  using Element = T;
  static constexpr bool kSplit = false;
  static constexpr bool kFreshSums = false;  // float32 products are added to the accumulator term by term
  static constexpr bool kEvenTiles = false;  // a product may have an odd number of tiles
};

// bfloat16 has float32's range, so nothing overflows. float16 has three more significant bits, so it becomes a sum of
// two bfloat16, hi + lo, which holds 16 bits; a product is hi hi + lo hi + hi lo.
template <class T>
struct Wide {
  using Memory = T;
  using Element = std::conditional_t<kTensorCores<T>, prim::bfloat16, float>;
  static constexpr bool kSplit = std::is_same<T, prim::float16>::value;
  static constexpr bool kFreshSums = true;  // float32: see product.cuh
  static constexpr bool kEvenTiles = true;
  static_assert(sizeof(Element) == sizeof(T), "a tile is transformed where it lies");
};

template <class T>
EFFVIT_DEVICE void unpack2(uint32_t raw, float& low, float& high) {
  low = prim::to_float(T{static_cast<uint16_t>(raw)});
  high = prim::to_float(T{static_cast<uint16_t>(raw >> 16)});
}

// Two numbers as elements `hi` and, of a split format, `lo`, which holds the rest. hi is finite then: where it would be
// infinite or NaN, it is 1 or -1 and lo has the number. So hi hi + lo hi + hi lo is infinite where the product is, for
// lo meets hi only, which is zero only where the number is; an infinite hi would meet lo of numbers that need none.
template <class F>
EFFVIT_DEVICE void pack_pair(float low, float high, uint32_t& hi, uint32_t& lo) {
  hi = prim::pack2<typename F::Element>(low, high);
  if constexpr (F::kSplit) {
    lo = prim::pack2<prim::bfloat16>(low - prim::bit_cast<float>(hi << 16),
                                     high - prim::bit_cast<float>(hi & 0xffff0000u));
    // Adding 1 to an exponent of all ones carries into the bit above.
    const uint32_t special = ((((hi & 0x7f807f80u) + 0x00800080u) & 0x80008000u) >> 15) * 0xffffu;
    lo = (lo & ~special) | (hi & special);
    hi = (hi & ~(special & 0x7fff7fffu)) | (special & 0x3f803f80u);
  }
}

// ---- tiles ----

template <class F>
struct Operand;

template <class F>
struct Tile {
  using Element = typename F::Element;
  Shared<Element> hi, lo;  // lo: of split formats only
  int stride = 0;  // elements from row to row

  Tile() = default;
  EFFVIT_DEVICE Tile(int byte_offset, int rows, int cols) : Tile(byte_offset, byte_offset, rows, cols) {}
  EFFVIT_DEVICE Tile(int byte_offset, int lo_byte_offset, int rows, int cols)
      : hi(byte_offset, rows * row_stride<Element>(cols)), stride(row_stride<Element>(cols)) {
    if constexpr (F::kSplit) lo = Shared<Element>(lo_byte_offset, rows * stride);
  }
  EFFVIT_DEVICE Operand<F> at(int row, int col) const { return {*this, row, col}; }
};

// A tile from an element on: what a product takes.
template <class F>
struct Operand {
  Tile<F> tile;
  int row, col;
};

template <class F>
EFFVIT_DEVICE void store_pair(const Tile<F>& to, int i, float low, float high) {
  if constexpr (kTensorCores<typename F::Element>) {
    uint32_t hi, lo;
    pack_pair<F>(low, high, hi, lo);
    to.hi.store_vec(i, hi);
    if constexpr (F::kSplit) to.lo.store_vec(i, lo);
  } else {
    to.hi.store_vec(i, Vec<float, 2>{{low, high}});
  }
}
template <class F>
EFFVIT_DEVICE void store_piece(const Tile<F>& to, int i, const float (&x)[kVec<typename F::Element>]) {
  if constexpr (kTensorCores<typename F::Element>) {
    Vec<uint32_t, 4> hi, lo;
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) pack_pair<F>(x[2 * e], x[2 * e + 1], hi.v[e], lo.v[e]);
    to.hi.store_vec(i, hi);
    if constexpr (F::kSplit) to.lo.store_vec(i, lo);
  } else {
    to.hi.store_vec(i, Vec<float, 4>{{x[0], x[1], x[2], x[3]}});
  }
}
template <class F>
EFFVIT_DEVICE float load_element(const Tile<F>& from, int i) {
  float x = prim::to_float(from.hi.load(i));
  if constexpr (F::kSplit) x += prim::to_float(from.lo.load(i));
  return x;
}

// ---- accumulators ----

template <int kN>
using Acc = float[kN][4];

EFFVIT_DEVICE int warp_row() { return prim::warp_id() * 16; }
EFFVIT_DEVICE int acc_row() { return warp_row() + prim::lane_id() / 4; }
EFFVIT_DEVICE int acc_col() { return prim::lane_id() % 4 * 2; }

// f(n, e) for the accumulators of the first n_tiles tiles, all indices known to the compiler.
template <int kN, class F>
EFFVIT_DEVICE void for_each_acc(int n_tiles, const F& f) {
  EFFVIT_UNROLL
  for (int n = 0; n < kN; ++n) {
    if (n < n_tiles) {
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) f(n, e);
    }
  }
}
// f(n, half, row, col) for pairs of accumulators acc[n][2 half] and the next, at column col + 8 n of row acc_row() + 8
// half.
template <int kN, class F>
EFFVIT_DEVICE void for_each_pair(int n_tiles, const F& f) {
  const int row = acc_row(), col = acc_col();
  EFFVIT_UNROLL
  for (int n = 0; n < kN; ++n) {
    EFFVIT_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (n < n_tiles) f(n, half, row + 8 * half, col + 8 * n);
    }
  }
}

template <int kN>
EFFVIT_DEVICE void clear(float (&acc)[kN][4]) {
  for_each_acc<kN>(kN, [&](int n, int e) { acc[n][e] = 0.f; });
}
template <int kN>
EFFVIT_DEVICE void add(float (&acc)[kN][4], const float (&x)[kN][4], int n_tiles) {
  for_each_acc<kN>(n_tiles, [&](int n, int e) { acc[n][e] += x[n][e]; });
}

// This warp's 16 rows of a tile, from column `col` on.
template <class F, int kN>
EFFVIT_DEVICE void store_acc(const Tile<F>& to, int col, const float (&acc)[kN][4], int n_tiles) {
  for_each_pair<kN>(n_tiles, [&](int n, int half, int row, int at) {
    store_pair(to, row * to.stride + col + at, acc[n][2 * half], acc[n][2 * half + 1]);
  });
}

}  // namespace tile
}  // namespace cuda
}  // namespace effvit
