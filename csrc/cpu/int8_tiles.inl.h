// Tiles of int8 products with dense weights: by dot products of bytes, by products of int16, and on AMX. See
// int8_gemm.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace int8_impl {

// Blocks of 16 columns: [groups of 4 along K][16][4] bytes each, `stride` bytes from one to the next.
struct PackedWeights {
  const uint8_t* data;
  int64_t stride;
};

// acc[rows][kMostColumns] = x w over kVectors vectors of columns.
#if defined(EFFVIT_HAS_INT8_DOT)
constexpr int kColumnsOfVector = kLanes;

template <int kRows, int kVectors>
void multiply(const int8_t* x, int64_t stride, int64_t K, const uint8_t* w, int64_t block, int32_t* acc) {
  constexpr int kPerBlock = kBlock / kLanes;
  vi sum[kRows][kVectors] = {};
  const uint8_t* from[kVectors];
  for (int j = 0; j < kVectors; ++j) from[j] = w + j / kPerBlock * block + j % kPerBlock * 4 * kLanes;
  // Few address registers: three rows to each.
  const int8_t* rows[(kRows + 2) / 3];
  for (int r = 0; r < kRows; r += 3) rows[r / 3] = x + r * stride;
  const auto step = [&](int64_t g, const auto& word) __attribute__((always_inline)) {
    vi v[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      v[j] = load(reinterpret_cast<const int32_t*>(from[j] + 64 * g));
      if constexpr (kVectors == kFewVectors) __builtin_prefetch(from[j] + 64 * g + kAhead);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vi four = set1(word(r));
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[r][j] = dot_bytes(sum[r][j], v[j], four);
    }
  };
  const int64_t groups = K / 4;
  for (int64_t g = 0; g < groups; ++g) step(g, [&](int r) { return load_word(rows[r / 3] + r % 3 * stride + 4 * g); });
  if (K % 4) {
    int32_t tail[kRows];
    load_tails(tail, x, stride, K);
    step(groups, [&](int r) { return tail[r]; });
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(acc + r * kMostColumns + j * kLanes, sum[r][j]);
  }
}

// Of tiles of as good as the same height: a low one has too few sums for the weights that it loads.
inline int even_height(int rows) {
  const int tiles = std::max(1, (rows + kRowsOfTile - 1) / kRowsOfTile);
  return (rows + tiles - 1) / tiles;
}

// x is read where it lies.
class DotTiles {
 public:
  using Weights = PackedWeights;
  static constexpr bool kTakesRowSums = true;
  DotTiles(Scratch&, int rows, int64_t K) : height_(even_height(rows)), few_(rows <= kRowsOfTile / 2), K_(K) {}
  int height() const { return height_; }
  int panel() const { return (few_ ? kFewVectors : 2) * kLanes; }
  void take_rows(const int8_t* x, int64_t stride) { x_ = x, stride_ = stride; }
  void take_panel(const Weights& w, int64_t column, int) {
    w_ = w.data + column / kBlock * w.stride + column % kBlock * 4, block_ = w.stride;
  }
  void multiply(int row, int rows, int columns, int32_t* acc) const {
    const int vectors = (columns + kLanes - 1) / kLanes;
    const int8_t* const x = x_ + row * stride_;
    if (few_) {
      with_constant<kRowsOfTile / 2>(rows, [&](auto n) { columns_of<n, kFewVectors>(x, vectors, acc); });
    } else {
      with_constant<kRowsOfTile>(rows, [&](auto n) { columns_of<n, 2>(x, vectors, acc); });
    }
  }

 private:
  template <int kRows, int kMost>
  void columns_of(const int8_t* x, int vectors, int32_t* acc) const {
    with_constant<kMost>(vectors, [&](auto n) { int8_impl::multiply<kRows, n>(x, stride_, K_, w_, block_, acc); });
  }

  int height_;
  bool few_;
  int64_t K_, stride_ = 0, block_ = 0;
  const int8_t* x_ = nullptr;
  const uint8_t* w_ = nullptr;
};
#endif

// Products of int16 in pairs: a vector holds two sums for each of kLanes / 2 columns.
template <int kRows, int kVectors>
void multiply_halves(const int16_t* x, int64_t groups, const uint8_t* w, int64_t block, int32_t* acc) {
  constexpr int kColumns = kLanes / 2, kPerBlock = kBlock / kColumns;
  vi sum[kRows][kVectors] = {};
  const uint8_t* from[kVectors];
  for (int j = 0; j < kVectors; ++j) from[j] = w + j / kPerBlock * block + j % kPerBlock * 4 * kColumns;
  for (int64_t g = 0; g < groups; ++g) {
    vh v[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) v[j] = load_halves(from[j] + 64 * g);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vh four = broadcast_halves(x + (g * kRows + r) * 4);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[r][j] = dot_halves(sum[r][j], v[j], four);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; j += 2)
      store(acc + r * kMostColumns + j / 2 * kLanes, add_pairs(sum[r][j], sum[r][j + 1]));
  }
}

// Rows of x as int16: of a tile [ceil(K / 4)][rows of the tile][4], zeros beyond K.
class HalvesRows {
 public:
  HalvesRows(Scratch& scratch, int rows, int64_t K)
      : rows_(rows), K_(K), groups_((K + 3) / 4), x_(scratch.take<int16_t>(rows * groups_ * 4)) {}
  void take(const int8_t* x, int64_t stride) {
    for (int t = 0; t < rows_; t += kRowsOfTile) {
      const int rows = std::min(kRowsOfTile, rows_ - t);
      for (int r = 0; r < rows; ++r) {
        const int8_t* const from = x + (t + r) * stride;
        int16_t* to = x_ + (t * groups_ + r) * 4;
        int64_t k = 0;
        for (; k + 4 <= K_; k += 4, to += 4 * rows) {
          for (int i = 0; i < 4; ++i) to[i] = from[k + i];
        }
        if (k == K_) continue;
        for (int i = 0; i < 4; ++i) to[i] = k + i < K_ ? from[k + i] : 0;
      }
    }
  }
  const int16_t* tile(int row) const { return x_ + row * groups_ * 4; }
  int64_t groups() const { return groups_; }
  int rows() const { return rows_; }

 private:
  int rows_;
  int64_t K_, groups_;
  int16_t* x_;
};

class HalvesTiles {
 public:
  using Weights = PackedWeights;
  static constexpr bool kTakesRowSums = true;
  HalvesTiles(Scratch& scratch, int rows, int64_t K) : x_(scratch, rows, K) {}
  int height() const { return kRowsOfTile; }
  int panel() const { return kVectors * kLanes / 2; }
  void take_rows(const int8_t* x, int64_t stride) { x_.take(x, stride); }
  void take_panel(const Weights& w, int64_t column, int) {
    w_ = w.data + column / kBlock * w.stride + column % kBlock * 4, block_ = w.stride;
  }
  void multiply(int row, int rows, int, int32_t* acc) const {
    with_constant<kRowsOfTile>(
        rows, [&](auto n) { multiply_halves<n, kVectors>(x_.tile(row), x_.groups(), w_, block_, acc); });
  }

 private:
  static constexpr int kVectors = 2;
  HalvesRows x_;
  int64_t block_ = 0;
  const uint8_t* w_ = nullptr;
};

#if defined(EFFVIT_HAS_INT8_DOT) && defined(EFFVIT_HAS_TILES)
// AMX: tiles of 32 x 32 results. x is copied with zeros to whole tiles; the last groups of the weights too.
class AmxTiles {
 public:
  using Weights = PackedWeights;
  static constexpr bool kTakesRowSums = true;
  AmxTiles(Scratch& scratch, int rows, int64_t K)
      : rows_(rows),
        K_(K),
        steps_((K + 63) / 64),
        stride_(64 * steps_),
        x_(scratch.take<int8_t>(round_up(rows, 16) * stride_)),
        tail_(scratch.take<uint8_t>(2 * 1024)) {}
  int height() const { return 32; }
  int panel() const { return 32; }
  void take_rows(const int8_t* x, int64_t stride) {
    for (int r = 0; r < round_up(rows_, 16); ++r) {
      int8_t* const to = x_ + r * stride_;
      const int64_t n = r < rows_ ? K_ : 0;
      if (n) std::memcpy(to, x + r * stride, static_cast<size_t>(n));
      std::memset(to + n, 0, static_cast<size_t>(stride_ - n));
    }
  }
  void take_panel(const Weights& w, int64_t column, int columns) {
    blocks_ = columns > 16 ? 2 : 1;
    const int64_t whole = K_ / 64, rest = (K_ + 3) / 4 - 16 * whole;
    for (int j = 0; j < blocks_; ++j) {
      w_[j] = w.data + (column / kBlock + j) * w.stride;
      if (rest) {  // what tiles read beyond it meets zeros of x
        std::memset(tail_ + 1024 * j, 0, 1024);
        std::memcpy(tail_ + 1024 * j, w_[j] + 1024 * whole, static_cast<size_t>(64 * rest));
      }
    }
  }
  void multiply(int row, int rows, int, int32_t* acc) const {
    if (rows > 16)
      blocks_ == 2 ? tiles<2, 2>(row, acc) : tiles<2, 1>(row, acc);
    else
      blocks_ == 2 ? tiles<1, 2>(row, acc) : tiles<1, 1>(row, acc);
  }

 private:
  template <int kM, int kN>
  void tiles(int row, int32_t* acc) const {
    before_tile_loads();
    EFFVIT_TILE_ZERO(0);
    EFFVIT_TILE_ZERO(1);
    EFFVIT_TILE_ZERO(2);
    EFFVIT_TILE_ZERO(3);
    const int8_t* const x = x_ + row * stride_;
    for (int64_t s = 0; s < steps_; ++s) {
      const bool whole = 64 * (s + 1) <= K_;
      [[maybe_unused]] const uint8_t* const w0 = whole ? w_[0] + 1024 * s : tail_;
      [[maybe_unused]] const uint8_t* const w1 = whole ? w_[1] + 1024 * s : tail_ + 1024;
      EFFVIT_TILE_LOAD(4, x + 64 * s, stride_);
      EFFVIT_TILE_LOAD(6, w0, 64);
      if constexpr (kN == 2) EFFVIT_TILE_LOAD(7, w1, 64);
      if constexpr (kM == 2) EFFVIT_TILE_LOAD(5, x + 16 * stride_ + 64 * s, stride_);
      EFFVIT_TILE_DOT_BYTES(0, 4, 6);
      if constexpr (kN == 2) EFFVIT_TILE_DOT_BYTES(1, 4, 7);
      if constexpr (kM == 2) EFFVIT_TILE_DOT_BYTES(2, 5, 6);
      if constexpr (kM * kN == 4) EFFVIT_TILE_DOT_BYTES(3, 5, 7);
    }
    constexpr int kBytes = 4 * kMostColumns;
    EFFVIT_TILE_STORE(0, acc, kBytes);
    if constexpr (kN == 2) EFFVIT_TILE_STORE(1, acc + 16, kBytes);
    if constexpr (kM == 2) EFFVIT_TILE_STORE(2, acc + 16 * kMostColumns, kBytes);
    if constexpr (kM * kN == 4) EFFVIT_TILE_STORE(3, acc + 16 * kMostColumns + 16, kBytes);
  }

  TileScope scope_;
  int rows_;
  int64_t K_, steps_, stride_;
  int8_t* x_;
  uint8_t* tail_;
  int blocks_ = 0;
  const uint8_t* w_[2] = {};
};
#endif

}  // namespace int8_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
