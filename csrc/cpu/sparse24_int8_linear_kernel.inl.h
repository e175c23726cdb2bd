// sparse24_int8_linear on the CPU: forward, on raw pointers, compiled once per ISA. The GEMM of int8_gemm.inl.h with
// 2:4-sparse weights that stay compressed up to the registers; kInt8Dot says that the ISA has products of bytes.
//
// Packed weights: per block of 16 columns [K8][16][4] bytes of values, [K32][16] words of positions, 16 int32, the
// sums of the block's columns, and 64 bytes that say what this is; K8 = ceil(K / 8), K32 = ceil(K / 32). Of eight
// neighbours along K a column has four values, of the first and the second group in turn (v0 v0' v1 v1': as int16 they
// are split by shifts). Byte b of a word of positions belongs to the b-th of these; it has the position within its
// group for four times eight neighbours, two bits each. Beyond N and K values are 0.
//
// It is x that is brought into the order of the values: eight bytes of a row, broadcast, go through a byte shuffle by
// the positions, and one dot product then does the work of two dense ones. The operand that dot products of bytes want
// unsigned is x, as x + 128; what is too much is 128 times the column's sum, with which the sums start.
#pragma once

#include "int8_epilogue.inl.h"
#include "int8_tiles.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace sparse24_int8_linear_impl {

using namespace int8_impl;
using Params = Sparse24Int8LinearParams;

struct SparseWeights {
  const uint8_t* data;
  int64_t stride;  // bytes from one block to the next
  int64_t K8;
};

int64_t packed_width(int64_t K8) { return 64 * K8 + 64 * ceil_div(K8, 4) + 128; }

// A panel: vector j of columns lies in these.
template <int kVectors>
struct Panel {
  static constexpr int kPerBlock = kBlock / kLanes;
  const uint8_t* values[kVectors];
  const int32_t *positions[kVectors], *sums[kVectors];

  Panel(const SparseWeights& w, int64_t column) {
    for (int j = 0; j < kVectors; ++j) {
      const int64_t first = column + j * kLanes;
      const uint8_t* const block = w.data + first / kBlock * w.stride;
      const int64_t within = first % kBlock;
      values[j] = block + 4 * within;
      positions[j] = reinterpret_cast<const int32_t*>(block + 64 * w.K8) + within;
      sums[j] = positions[j] + kBlock * ceil_div(w.K8, 4);
    }
  }
};

// Calls step(k, k % 4 as a constant) for k < n.
template <class F>
EFFVIT_INLINE void four_steps(int64_t n, const F& step) {
  const std::integral_constant<int, 0> first;
  const std::integral_constant<int, 1> second;
  const std::integral_constant<int, 2> third;
  const std::integral_constant<int, 3> fourth;
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) step(k, first), step(k + 1, second), step(k + 2, third), step(k + 3, fourth);
  if (k < n) step(k, first);
  if (k + 1 < n) step(k + 1, second);
  if (k + 2 < n) step(k + 2, third);
}

#if defined(EFFVIT_HAS_INT8_DOT)
// x: rows of 8 * K8 bytes, x + 128.
template <int kRows, int kVectors>
void multiply(const uint8_t* x, const SparseWeights& w, int64_t column, int32_t* acc) {
  const Panel<kVectors> p(w, column);
  const int64_t K8 = w.K8, stride = 8 * K8;
  vi sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kVectors; ++j) sum[r][j] = load(p.sums[j]) * -128;
  }
  const uint8_t* rows[(kRows + 2) / 3];  // few address registers: three rows to each
  for (int r = 0; r < kRows; r += 3) rows[r / 3] = x + r * stride;
  const auto step = [&](int64_t k, auto quarter) __attribute__((always_inline)) {
    vi value[kVectors], at[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      value[j] = load(reinterpret_cast<const int32_t*>(p.values[j] + 64 * k));
      if constexpr (kVectors == kFewVectors) {
        __builtin_prefetch(p.values[j] + 64 * k + kAhead);
        if constexpr (quarter == 0)
          __builtin_prefetch(reinterpret_cast<const uint8_t*>(p.positions[j] + k / 4 * kBlock) + kAhead);
      }
      at[j] = ((load(p.positions[j] + k / 4 * kBlock) >> 2 * quarter) & 0x03030303) | 0x04000400;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vi eight = broadcast_eight(rows[r / 3] + r % 3 * stride + 8 * k);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[r][j] = dot_bytes(sum[r][j], shuffle_bytes(eight, at[j]), value[j]);
    }
  };
  four_steps(K8, step);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(acc + r * kMostColumns + j * kLanes, sum[r][j]);
  }
}

// x is copied as x + 128, to whole groups of eight.
class SparseDotTiles {
 public:
  using Weights = SparseWeights;
  static constexpr bool kTakesRowSums = false;
  SparseDotTiles(Scratch& scratch, int rows, int64_t K)
      : height_(even_height(rows)),
        few_(rows <= kRowsOfTile / 2),
        rows_(rows),
        K_(K),
        stride_((K + 7) / 8 * 8),
        x_(scratch.take<uint8_t>(rows * stride_)) {}
  int height() const { return height_; }
  int panel() const { return (few_ ? kFewVectors : 2) * kLanes; }
  void take_rows(const int8_t* x, int64_t stride) {
    for (int r = 0; r < rows_; ++r) {
      uint8_t* const to = x_ + r * stride_;
      const int8_t* const from = x + r * stride;
      int64_t k = 0;
      for (; k < K_; ++k) to[k] = static_cast<uint8_t>(from[k] ^ -128);
      for (; k < stride_; ++k) to[k] = 0;
    }
  }
  void take_panel(const Weights& w, int64_t column, int) { w_ = w, column_ = column; }
  void multiply(int row, int rows, int columns, int32_t* acc) const {
    const int vectors = (columns + kLanes - 1) / kLanes;
    const uint8_t* const x = x_ + row * stride_;
    if (few_) {
      with_constant<kRowsOfTile / 2>(rows, [&](auto n) { columns_of<n, kFewVectors>(x, vectors, acc); });
    } else {
      with_constant<kRowsOfTile>(rows, [&](auto n) { columns_of<n, 2>(x, vectors, acc); });
    }
  }

 private:
  template <int kRows, int kMost>
  void columns_of(const uint8_t* x, int vectors, int32_t* acc) const {
    with_constant<kMost>(vectors, [&](auto n) { sparse24_int8_linear_impl::multiply<kRows, n>(x, w_, column_, acc); });
  }

  int height_;
  bool few_;
  int rows_;
  int64_t K_, stride_, column_ = 0;
  uint8_t* x_;
  SparseWeights w_{};
};
#endif

// Values and positions of group g of eight neighbours as int16: what a shuffle of four int16 of x, and a product of
// these in pairs, take.
template <int g, int quarter>
EFFVIT_INLINE void decode(const uint8_t* values, const int32_t* positions, vh& value, vi& at) {
  const vh pairs = (vh)load(reinterpret_cast<const int32_t*>(values));
  value = g ? pairs >> 8 : (pairs << 8) >> 8;
  at = (vi)((vh)((load(positions) >> (8 * g + 2 * quarter)) & 0x00030003) * 0x0202 + 0x0100);
}

// groups: of four, an even number in the weights.
template <int kRows, int kVectors, class Source>
EFFVIT_INLINE void multiply_halves(const int16_t* x, int64_t groups, const Source& source, int32_t* acc) {
  vi sum[kRows][kVectors] = {};
  const auto group = [&](int64_t k, auto quarter, auto g) __attribute__((always_inline)) {
    vh value[kVectors];
    vi at[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) source(j, k, quarter, g, value[j], at[j]);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vi four = (vi)broadcast_halves(x + ((2 * k + g) * kRows + r) * 4);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[r][j] = dot_halves(sum[r][j], value[j], (vh)shuffle_bytes(four, at[j]));
    }
  };
  four_steps((groups + 1) / 2, [&](int64_t k, auto quarter) __attribute__((always_inline)) {
    group(k, quarter, std::integral_constant<int, 0>{});
    if (2 * k + 1 < groups) group(k, quarter, std::integral_constant<int, 1>{});
  });
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(acc + r * kMostColumns + j * kLanes, sum[r][j]);
  }
}

// x is copied as int16. The panel is decoded once where several tiles of rows use it.
class SparseHalvesTiles {
 public:
  using Weights = SparseWeights;
  static constexpr bool kTakesRowSums = false;
  SparseHalvesTiles(Scratch& scratch, int rows, int64_t K)
      : x_(scratch, rows, K), decoded_(scratch.take<Decoded>(rows > kRowsOfTile ? kVectors * (K + 7) / 8 * 2 : 0)) {}
  int height() const { return kRowsOfTile; }
  int panel() const { return kVectors * kLanes; }
  void take_rows(const int8_t* x, int64_t stride) { x_.take(x, stride); }
  void take_panel(const Weights& w, int64_t column, int columns) {
    w_ = w, column_ = column, vectors_ = (columns + kLanes - 1) / kLanes;
    if (x_.rows() <= kRowsOfTile) return;
    if (vectors_ == kVectors)
      decode_panel<kVectors>();
    else
      decode_panel<1>();
  }
  void multiply(int row, int rows, int, int32_t* acc) const {
    with_constant<kRowsOfTile>(rows, [&](auto n) {
      if (vectors_ == kVectors)
        columns_of<n, kVectors>(x_.tile(row), acc);
      else
        columns_of<n, 1>(x_.tile(row), acc);
    });
  }

 private:
  struct alignas(64) Decoded {
    vh value;
    vi at;
  };
  static constexpr int kVectors = 2;

  template <int n>
  void decode_panel() {
    const Panel<n> p(w_, column_);
    Decoded* to = decoded_;
    four_steps(w_.K8, [&](int64_t k, auto quarter) __attribute__((always_inline)) {
      for (int j = 0; j < n; ++j, ++to)
        decode<0, quarter>(p.values[j] + 64 * k, p.positions[j] + k / 4 * kBlock, to->value, to->at);
      for (int j = 0; j < n; ++j, ++to)
        decode<1, quarter>(p.values[j] + 64 * k, p.positions[j] + k / 4 * kBlock, to->value, to->at);
    });
  }
  template <int kRows, int n>
  void columns_of(const int16_t* x, int32_t* acc) const {
    if (x_.rows() > kRowsOfTile) {
      const Decoded* const from = decoded_;
      multiply_halves<kRows, n>(
          x, x_.groups(),
          [=](int j, int64_t k, int, int g, vh& value, vi& at) __attribute__((always_inline)) {
            const Decoded& d = from[(2 * k + g) * n + j];
            value = d.value, at = d.at;
          },
          acc);
      return;
    }
    const Panel<n> p(w_, column_);
    multiply_halves<kRows, n>(
        x, x_.groups(),
        [&](int j, int64_t k, auto quarter, auto g, vh& value, vi& at) __attribute__((always_inline)) {
          decode<g, quarter>(p.values[j] + 64 * k, p.positions[j] + k / 4 * kBlock, value, at);
        },
        acc);
  }

  HalvesRows x_;
  Decoded* decoded_;
  SparseWeights w_{};
  int64_t column_ = 0;
  int vectors_ = 0;
};

// AMX has no sparse product: from here on rows, weights are made dense once and go there.
constexpr int64_t kDenseFrom = 48;
bool dense(const Params& p) { return kInt8Tiles && p.M >= kDenseFrom; }

int64_t blocks(const Params& p) { return ceil_div(p.N, kBlock); }
int64_t dense_width(const Params& p) { return 64 * (ceil_div(p.K, 4) + 1); }
int64_t sparse_bytes(const Params& p) { return p.meta ? blocks(p) * packed_width(ceil_div(p.K, 8)) : 0; }

// The packed weight where it is not given, then, a row more for the odd group, the dense one.
int64_t workspace(const Params& p) { return (sparse_bytes(p) + (dense(p) ? blocks(p) * dense_width(p) + 64 : 0)) / 4; }

SparseWeights weights_of(const Params& p, float* workspace) {
  const int64_t K8 = ceil_div(p.K, 8);
  if (p.meta) return {reinterpret_cast<const uint8_t*>(workspace), packed_width(K8), K8};
  return {reinterpret_cast<const uint8_t*>(p.values), p.values_stride_n, K8};
}

int64_t pack_units(const Params& p) { return p.meta ? blocks(p) : 0; }

void pack(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const int64_t K8 = ceil_div(p.K, 8), width = packed_width(K8), half = p.K / 2;
  for (int64_t block = begin; block < end; ++block) {
    uint8_t* const to = reinterpret_cast<uint8_t*>(workspace) + block * width;
    std::memset(to, 0, static_cast<size_t>(width));
    for (int c = 0; c < kBlock && block * kBlock + c < p.N; ++c) {
      const int64_t n = block * kBlock + c;
      const int8_t* const v = p.values + n * p.values_stride_n;
      int32_t sum = 0;
      for (int64_t k = 0; k < K8; ++k) {
        int8_t four[4] = {};
        std::memcpy(four, v + 4 * k, static_cast<size_t>(std::min<int64_t>(4, half - 4 * k)));
        const int8_t in_turn[4] = {four[0], four[2], four[1], four[3]};
        std::memcpy(to + 64 * k + 4 * c, in_turn, 4);
        const int m = p.meta[n * K8 + k];
        uint8_t* const word = to + 64 * K8 + 64 * (k / 4) + 4 * c;
        const int at[4] = {m & 3, m >> 4 & 3, m >> 2 & 3, m >> 6 & 3};
        for (int b = 0; b < 4; ++b) word[b] = static_cast<uint8_t>(word[b] | at[b] << (2 * (k % 4)));
        sum += four[0] + four[1] + four[2] + four[3];
      }
      std::memcpy(to + width - 128 + 4 * c, &sum, 4);
    }
  }
}

int64_t expand_units(const Params& p) { return dense(p) ? blocks(p) : 0; }

// Every block as int8_linear has it.
void expand(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const SparseWeights w = weights_of(p, workspace);
  uint8_t* const first = reinterpret_cast<uint8_t*>(workspace) + sparse_bytes(p);
  for (int64_t block = begin; block < end; ++block) {
    const uint8_t* const from = w.data + block * w.stride;
    uint8_t* const to = first + block * dense_width(p);
    for (int64_t k = 0; k < w.K8; ++k) {
      for (int c = 0; c < kBlock; c += kLanes) {
        const vi v = load(reinterpret_cast<const int32_t*>(from + 64 * k + 4 * c));
        const int32_t* const words_at = reinterpret_cast<const int32_t*>(from + 64 * w.K8) + k / 4 * kBlock + c;
        const vi at = (load(words_at) >> static_cast<int>(2 * (k % 4))) & 0x03030303;
        const vi low = ((v & 255) << (at << 3 & 24)) | ((v >> 16 & 255) << (at >> 13 & 24));
        const vi high = ((v >> 8 & 255) << (at >> 5 & 24)) | ((v >> 24 & 255) << (at >> 21 & 24));
        const vi sign = set1(static_cast<int32_t>(0x80808080));
        int32_t* const words = reinterpret_cast<int32_t*>(to + 128 * k + 4 * c);
        store(words, low ^ sign);
        if (8 * k + 4 < p.K) store(words + 16, high ^ sign);
      }
    }
  }
}

void run(const Params& p, float* workspace, int64_t begin, int64_t end) {
#if defined(EFFVIT_HAS_INT8_DOT)
#if defined(EFFVIT_HAS_TILES)
  if (dense(p)) {
    const uint8_t* const data = reinterpret_cast<const uint8_t*>(workspace) + sparse_bytes(p);
    return run_units<AmxTiles>(p, PackedWeights{data, dense_width(p)}, begin, end);
  }
#endif
  run_units<SparseDotTiles>(p, weights_of(p, workspace), begin, end);
#else
  run_units<SparseHalvesTiles>(p, weights_of(p, workspace), begin, end);
#endif
}

constexpr Step<Params> kForward[] = {{pack_units, pack}, {expand_units, expand}, {int8_impl::units<Params>, run}};

}  // namespace sparse24_int8_linear_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<Sparse24Int8LinearParams>* EFFVIT_KERNEL_NAME(sparse24_int8_linear)() {
  namespace impl = EFFVIT_ISA_NAME::sparse24_int8_linear_impl;
  static constexpr Kernel<Sparse24Int8LinearParams> kernel = {routine(impl::kForward, impl::workspace), {}};
  return &kernel;
}
}  // namespace effvit::cpu
