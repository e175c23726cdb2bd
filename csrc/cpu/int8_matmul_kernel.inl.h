// int8_matmul on the CPU: forward, on raw pointers, compiled once per ISA. kInt8Dot says that the ISA has products of
// bytes.
//
// A unit of work is a chunk of rows times a chunk of columns of one matrix; the columns are packed once for all of its
// units that a thread runs one after the other.
//
// Bytes times bytes, where the ISA has such products: one operand has a sign and the other none, so b is offset by 128
// where it is of the kind of a, which the sum of a's row takes off again. All else as int16. Sums of int32 are over so
// much of K as cannot overflow, and added in 64 bits where that is not all. Where both are int16, b is taken as 256
// times its high byte, with a sign, plus its low one.
#pragma once

#include "int_products.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace int8_matmul_impl {

using namespace int_impl;
using Params = Int8MatmulParams;

constexpr int kBlockRows = kInt8Tiles ? 32 : 2 * kTileRows;
constexpr int64_t kUnitRows = 96, kMostColumns = 512;
constexpr int64_t kPackedBytes = 1 << 18;  // of a chunk of columns
constexpr int64_t kDepthStep = 64;  // parts of K are multiples of it: whole words, whole tiles

struct Geometry {
  bool bytes, split;  // operands are bytes; b is two numbers
  bool wide;  // sums may exceed int32
  int64_t depth;  // of K at once
  int64_t words, depth_words;  // of K, of depth
  int64_t columns, column_chunks, unit_rows, row_chunks;

  explicit Geometry(const Params& p) {
    const int64_t a = largest_of(p.a_dtype), b = largest_of(p.b_dtype);
    bytes = kInt8Dot && a < 256 && b < 256;
    split = a > 255 && b > 255;
    depth = int64_t{0x7fffffff} / (a * (split ? 255 : b)) / kDepthStep * kDepthStep;
    if (bytes) depth = std::min<int64_t>(depth, 65536);  // 255 * 128 * 65536 < 2^31
    wide = split || p.K > depth;
    const int64_t in_word = bytes ? 4 : 2;
    words = ceil_div(ceil_div(p.K, in_word), kWordsTogether) * kWordsTogether, depth_words = depth / in_word;
    const bool small = small_tiles();
    const int64_t fit = kPackedBytes / (4 * std::max<int64_t>(words, 1) * (split ? 2 : 1));
    const int64_t most = small ? 2 * kLanes : std::clamp<int64_t>(fit, 4 * kLanes, kMostColumns);
    column_chunks = ceil_div(p.N, most);
    columns = ceil_div(ceil_div(p.N, column_chunks), kLanes) * kLanes;
    column_chunks = ceil_div(p.N, columns);
    row_chunks = ceil_div(p.M, small ? kTileRows : kUnitRows);
    unit_rows = ceil_div(ceil_div(p.M, row_chunks), kTileRows) * kTileRows;
    row_chunks = ceil_div(p.M, unit_rows);
  }
};

int64_t units(const Params& p) {
  const Geometry g(p);
  return p.batches * g.column_chunks * g.row_chunks;
}

class Pass {
 public:
  Pass(const Params& p, const Geometry& g, Scratch& scratch) : p_(p), g_(g), rescale_(p.rescale) {
    const int64_t rows = round_up(kBlockRows, kRowsTogether);
    b_ = scratch.take<int32_t>(g.columns * g.words);
    low_ = scratch.take<int32_t>(g.split ? g.columns * g.words : 0);
    a_ = scratch.take<char>(rows * g.words * 4);
    sums_ = scratch.take<int32_t>(rows * g.columns);
    wide_ = scratch.take<int64_t>(g.wide ? rows * g.columns : 0);
  }

  void run(int64_t begin, int64_t end) {
    [[maybe_unused]] const ProductTiles tiles;
    std::memset(a_, 0, static_cast<size_t>(round_up(kBlockRows, kRowsTogether) * g_.words * 4));
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t chunk = unit / g_.row_chunks, batch = chunk / g_.column_chunks;
      const int64_t column = chunk % g_.column_chunks * g_.columns;
      width_ = std::min(g_.columns, p_.N - column);
      if (chunk != packed) pack(batch, column);
      packed = chunk;
      const int64_t first = unit % g_.row_chunks * g_.unit_rows, last = std::min(first + g_.unit_rows, p_.M);
      for (int64_t row = first; row < last; row += kBlockRows)
        block(batch, column, row, static_cast<int>(std::min<int64_t>(kBlockRows, last - row)));
    }
  }

 private:
  // Whether b has the other kind of bytes in memory.
  bool flips() const { return p_.a_dtype == p_.b_dtype; }

  void pack(int64_t batch, int64_t column) {
    const int64_t start = matrix_start(p_, p_.b_stride, batch) + column * (p_.transpose_b ? p_.b_row : 1);
    if (kWordsTogether > 1) std::memset(b_, 0, static_cast<size_t>(g_.columns * g_.words) * 4);
    if (p_.b_dtype == DType::kInt8) return pack_from(static_cast<const int8_t*>(p_.b) + start);
    if (p_.b_dtype == DType::kUInt8) return pack_from(static_cast<const uint8_t*>(p_.b) + start);
    pack_from(static_cast<const int16_t*>(p_.b) + start);
  }

  template <class T>
  void pack_from(const T* b) {
    int32_t *const to = b_, *const low = low_;
    const int64_t panel = g_.words * kLanes;
    const auto put = [&](int64_t j, int64_t w, vi x) { store(to + j * panel + w * kLanes, x); };
    const auto put_split = [&](int64_t j, int64_t w, vi x) {
      store(to + j * panel + w * kLanes, (vi)((vh)x >> 8));
      store(low + j * panel + w * kLanes, x & 0x00ff00ff);
    };
    const auto rows = [&](const auto& sink) {
      words_of_rows(reinterpret_cast<const char*>(b), p_.b_row * static_cast<int64_t>(sizeof(T)), width_,
                    p_.K * static_cast<int64_t>(sizeof(T)), sink);
    };
    if constexpr (sizeof(T) == 2) {
      if (g_.split)
        p_.transpose_b ? rows(put_split) : words_of_columns<2>(b, p_.b_row, p_.K, width_, put_split);
      else
        p_.transpose_b ? rows(put) : words_of_columns<2>(b, p_.b_row, p_.K, width_, put);
    } else if (g_.bytes) {
      const vi flip = set1(flips() ? static_cast<int32_t>(0x80808080) : 0);
      const auto put_bytes = [&](int64_t j, int64_t w, vi x) { put(j, w, x ^ flip); };
      p_.transpose_b ? rows(put_bytes) : words_of_columns<4>(b, p_.b_row, p_.K, width_, put_bytes);
    } else if (p_.transpose_b) {
      rows([&](int64_t j, int64_t w, vi x) {  // the last word may have no second pair
        put(j, 2 * w, low_pair<std::is_signed_v<T>>(x));
        if (4 * w + 2 < p_.K) put(j, 2 * w + 1, high_pair<std::is_signed_v<T>>(x));
      });
    } else {
      words_of_columns<2>(b, p_.b_row, p_.K, width_, put);
    }
  }

  void take_rows(int64_t batch, int64_t row, int rows) {
    const int64_t start = matrix_start(p_, p_.a_stride, batch) + row * p_.a_row;
    for (int r = 0; r < rows; ++r) {
      const int64_t at = start + r * p_.a_row;
      char* const to = a_ + r * g_.words * 4;
      if (g_.bytes)
        std::memcpy(to, static_cast<const char*>(p_.a) + at, static_cast<size_t>(p_.K));
      else if (p_.a_dtype == DType::kInt8)
        widen(static_cast<const int8_t*>(p_.a) + at, p_.K, reinterpret_cast<int16_t*>(to), 2 * g_.words);
      else if (p_.a_dtype == DType::kUInt8)
        widen(static_cast<const uint8_t*>(p_.a) + at, p_.K, reinterpret_cast<int16_t*>(to), 2 * g_.words);
      else
        std::memcpy(to, static_cast<const int16_t*>(p_.a) + at, static_cast<size_t>(p_.K) * 2);
    }
  }

  // What the offset of b adds to a row over n bytes: 128 times the sum of a, less where a has a sign.
  int32_t offset_of(const char* a, int64_t n) const {
    if (!g_.bytes || !flips()) return 0;
    if (p_.a_dtype == DType::kInt8) return 128 * sum_bytes(reinterpret_cast<const int8_t*>(a), n);
    int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += static_cast<uint8_t>(a[i]);
    return static_cast<int32_t>(-128 * sum);
  }

  void block(int64_t batch, int64_t column, int64_t row, int rows) {
    take_rows(batch, row, rows);
    const int panels = static_cast<int>(ceil_div(width_, kLanes));
    const int64_t size = g_.words * 4, panel = g_.words * kLanes, out_row = g_.columns;
    const auto product = [&](const int32_t* b, int64_t word, int64_t words) {
      const Left left = {a_ + 4 * word, size};
      const Right right = {b + word * kLanes, panel};
#if defined(EFFVIT_HAS_INT8_DOT)
      if (g_.bytes) {
        if (p_.a_dtype == DType::kInt8)
          return multiply_on_tiles<SignedRows>(left, right, words, rows, panels, sums_, out_row);
        return multiply_on_tiles<UnsignedRows>(left, right, words, rows, panels, sums_, out_row);
      }
#endif
      multiply<Halves>(left, right, words, rows, panels, sums_, out_row);
    };
    int32_t offsets[kBlockRows] = {};
    if (!g_.wide) {
      product(b_, 0, g_.words);
      for (int r = 0; r < rows; ++r) offsets[r] = offset_of(a_ + r * size, p_.K);
    } else {
      std::fill_n(wide_, rows * out_row, int64_t{0});
      for (int64_t word = 0; word < g_.words; word += g_.depth_words) {
        const int64_t words = std::min(g_.depth_words, g_.words - word);
        product(b_, word, words);
        add(rows, panels, g_.split ? 256 : 1, [&](int r) { return offset_of(a_ + r * size + 4 * word, 4 * words); });
        if (!g_.split) continue;
        product(low_, word, words);
        add(rows, panels, 1, [](int) { return 0; });
      }
      for (int64_t i = 0; i < rows * out_row; ++i)
        sums_[i] = static_cast<int32_t>(std::clamp<int64_t>(wide_[i], INT32_MIN, INT32_MAX));
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t at = (batch * p_.M + row + r) * p_.N + column;
      const int32_t* const sums = sums_ + r * out_row;
      switch (p_.out_dtype) {
        case DType::kInt32:
          put(sums, offsets[r], static_cast<int32_t*>(p_.out) + at);
          break;
        case DType::kInt16:
          put(sums, offsets[r], static_cast<int16_t*>(p_.out) + at);
          break;
        case DType::kUInt8:
          put(sums, offsets[r], static_cast<uint8_t*>(p_.out) + at);
          break;
        default:
          put(sums, offsets[r], static_cast<int8_t*>(p_.out) + at);
      }
    }
  }

  template <class Offset>
  void add(int rows, int panels, int64_t factor, const Offset& offset) {
    for (int r = 0; r < rows; ++r) {
      const int64_t off = offset(r);
      int64_t* const to = wide_ + r * g_.columns;
      const int32_t* const from = sums_ + r * g_.columns;
      for (int i = 0; i < panels * kLanes; ++i) to[i] += (from[i] - off) * factor;
    }
  }

  template <class T>
  void put(const int32_t* sums, int32_t offset, T* to) const {
    const Rescaler rescale = rescale_;
    const int64_t n = width_;
    const vi off = set1(offset);
    const auto at = [&](int64_t i) __attribute__((always_inline)) { return rescale(load(sums + i) - off); };
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
      store_four(to + i, at(i), at(i + kLanes), at(i + 2 * kLanes), at(i + 3 * kLanes));
    for (; i < n; i += kLanes) store_first(to + i, at(i), n - i);
  }

  const Params& p_;
  const Geometry g_;
  const Rescaler rescale_;
  int32_t *b_, *low_;  // [panels][words][kLanes]
  char* a_;  // [rows][words], words
  int32_t* sums_;  // [rows][columns]
  int64_t* wide_;  // likewise
  int64_t width_ = 0;  // of the chunk of columns
};

void run(const Params& p, float*, int64_t begin, int64_t end) { run_pass<Pass>(p, Geometry(p), begin, end); }

constexpr Step<Params> kForward[] = {{units, run}};

}  // namespace int8_matmul_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<Int8MatmulParams>* EFFVIT_KERNEL_NAME(int8_matmul)() {
  namespace impl = EFFVIT_ISA_NAME::int8_matmul_impl;
  static constexpr Kernel<Int8MatmulParams> kernel = {routine(impl::kForward), {}};
  return &kernel;
}
}  // namespace effvit::cpu
