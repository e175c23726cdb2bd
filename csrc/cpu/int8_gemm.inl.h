// GEMM with epilogue on int8: x [M, K] times packed weights, exact int32 sums in registers, results through an
// epilogue. No sum is ever written to memory but to a tile in the L1 cache.
//
// Packed weights hold w + 128 as unsigned bytes, because dot products of bytes (VNNI) want one unsigned operand; with
// the weights as that one, x is read as it is, and sum(x (w + 128)) is 128 sum(x) too large, which the epilogue takes
// off row by row. All of it wraps modulo 2^32 and ends below 2^31. Where there are no dot products of bytes, both
// operands become int16, whose products in pairs cannot saturate, as those of bytes would.
//
// A unit of work is a chunk of rows times a chunk of columns. Within it a panel of columns stays in the L1 or L2 cache
// while tiles of rows go by; K is never split.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace int8_impl {

constexpr int kBlock = 16;  // columns of a packed block
constexpr int kMostColumns = 64;  // of a tile
constexpr int kRowsOfTile = kLanes == 16 ? 12 : 6;  // 32 or 16 registers
// Few rows take wide panels, for enough sums at once, and wait for weights, which are fetched so many bytes ahead.
constexpr int kFewVectors = 4, kAhead = 1024;
constexpr int kRowsOfChunk = 96;  // a multiple of the rows of every tile
constexpr int64_t kUnitProducts = 1 << 22;  // of a unit, about
constexpr int64_t kRowsThatWait = 8;

// Chunks of rows and of columns, of about the same size, from the shape alone.
struct Chunks {
  int64_t rows, columns, m, n;

  Chunks(int64_t M, int64_t N, int64_t K) {
    constexpr int kTile = kInt8Tiles ? 32 : kRowsOfTile;
    const int64_t most = small_tiles() ? kTile : kRowsOfChunk;
    rows = even(M, ceil_div(M, most), kTile);
    // Of few rows it is the weights that take time.
    const int64_t work = std::max<int64_t>(rows, kRowsThatWait) * K * N;
    columns = small_tiles() ? kMostColumns : even(N, std::max<int64_t>(1, work / kUnitProducts), kMostColumns);
    m = ceil_div(M, rows), n = ceil_div(N, columns);
  }

  // Size of `count` equal parts, in multiples of `step`.
  static int64_t even(int64_t size, int64_t count, int64_t step) {
    return ceil_div(ceil_div(size, count), step) * step;
  }
};

// The last bytes of rows whose K is no multiple of 4.
template <int kRows>
EFFVIT_INLINE void load_tails(int32_t (&tail)[kRows], const int8_t* x, int64_t stride, int64_t K) {
  for (int r = 0; r < kRows; ++r) tail[r] = load_bytes(x + r * stride + K / 4 * 4, static_cast<int>(K % 4));
}

// Calls f with a number between 1 and kMost as a constant.
template <int kMost, class F>
EFFVIT_INLINE void with_constant(int n, const F& f) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_constant<kMost - 1>(n, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// What makes results of sums, by params: `Columns`, with set(p, first, count), and choose(p), which is a function (p,
// acc, ld, sums, row, rows, columns). int8_epilogue.inl.h and int_epilogue.inl.h define it.
template <class Params>
struct EpilogueOf;

template <class T, class V>
EFFVIT_INLINE void store_first(T* p, V v, int n) {
  if (n >= kLanes) return store(p, v);
  alignas(64) T some[kLanes];
  store(some, v);
  std::memcpy(p, some, static_cast<size_t>(n) * sizeof(T));
}

// A unit of work. `Tiles` takes the rows of a chunk, then a panel of columns, and computes acc[rows][kMostColumns] of
// up to height() rows of them.
template <class Tiles, class Params, class Finish>
void run_unit(const Params& p, const typename Tiles::Weights& weights, int64_t unit, Finish finish) {
  const Chunks chunks(p.M, p.N, p.K);
  const int64_t row = unit / chunks.n * chunks.rows, column = unit % chunks.n * chunks.columns;
  const int rows = static_cast<int>(std::min(chunks.rows, p.M - row));
  const int64_t end = std::min(column + chunks.columns, p.N);

  Scratch count;
  Tiles(count, rows, p.K);
  Scratch scratch(static_cast<char*>(thread_scratch(static_cast<size_t>(count.used()))));
  Tiles tiles(scratch, rows, p.K);
  tiles.take_rows(p.x + row * p.x_stride_m, p.x_stride_m);

  int32_t sums[kRowsOfChunk];
  for (int r = 0; r < rows; ++r) {
    sums[r] = 0;
    if constexpr (Tiles::kTakesRowSums)
      sums[r] = static_cast<int32_t>(128u * static_cast<uint32_t>(sum_bytes(p.x + (row + r) * p.x_stride_m, p.K)));
  }
  alignas(64) int32_t acc[32 * kMostColumns];
  typename EpilogueOf<Params>::Columns columns;
  const char* const out = static_cast<const char*>(p.out);
  const int size = static_cast<int>(element_bytes(p.out_dtype));
  for (int64_t c = column; c < end; c += tiles.panel()) {
    const int width = static_cast<int>(std::min<int64_t>(tiles.panel(), end - c));
    columns.set(p, c, width);
    tiles.take_panel(weights, c, width);
    for (int r = 0; r < rows; r += tiles.height()) {
      const int n = std::min(tiles.height(), rows - r);
      for (int i = 0; i < n; ++i) {  // lines of the result arrive while their sums are computed
        const char* const to = out + ((row + r + i) * p.N + c) * size;
        for (int b = 0; b < width * size; b += 64) __builtin_prefetch(to + b, 1);
      }
      tiles.multiply(r, n, width, acc);
      finish(p, acc, kMostColumns, sums + r, row + r, n, columns);
    }
  }
}

template <class Params>
int64_t units(const Params& p) {
  const Chunks chunks(p.M, p.N, p.K);
  return chunks.m * chunks.n;
}

template <class Tiles, class Params>
void run_units(const Params& p, const typename Tiles::Weights& weights, int64_t begin, int64_t end) {
  const auto finish = EpilogueOf<Params>::choose(p);
  for (int64_t unit = begin; unit < end; ++unit) run_unit<Tiles>(p, weights, unit, finish);
}

}  // namespace int8_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
