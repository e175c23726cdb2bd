// int_attention on the CPU: forward, on raw pointers, compiled once per ISA. kInt8Dot says that the ISA has products of
// bytes.
//
// A unit of work is a chunk of queries of one head. Keys and values of the head are packed once for all of its units
// that a thread runs one after the other. Of a block of query rows, scores, exponentials and probabilities stay in the
// L1 or L2 cache.
//
// Scores: products of bytes where the ISA has them, keys offset by 128 to have no sign, which adds 128 sum(q) to a row;
// else of int16. Probabilities below 2^8 are bytes where that is faster: a row of them adds up to less than 2^8, so
// that sums with values fit even into int16 (255 * 128 < 2^15), unless the sum of exponentials saturates. All others
// are int16, or two bytes on tiles; where they saturate, sums of int32 are over so many keys as cannot overflow, and
// added in 64 bits.
#pragma once

#include "int_products.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace int_attention_impl {

using namespace int_impl;
using Params = IntAttentionParams;

constexpr int kBlockRows = kInt8Tiles ? 32 : 2 * kTileRows;
constexpr int64_t kUnitRows = 96;
constexpr int64_t kScoresOfBlock = 1 << 16;  // rows times keys, but at least one row
constexpr int64_t kFetchedKeys = 256;  // of the next head
constexpr int64_t kChunkKeys = 508;  // 2^15 * 128 * 508 < 2^31
constexpr int64_t kChunkKeysOfBytes = 65536;  // 255 * 128 * 65536 < 2^31

#if defined(EFFVIT_HAS_INT8_DOT)
using ScoreDot = SignedRows;
using ByteDot = UnsignedRows;
#else
using ScoreDot = Halves;
using ByteDot = ShortSums;
#endif

struct Geometry {
  bool bytes;  // probabilities are bytes,
  bool split;  // of 16 bits two, low and high: tiles are of bytes alone
  bool wide;  // sums with values may exceed int32
  int rows;  // of a block
  int64_t units, unit_rows;  // of a head
  int64_t key_panels, value_panels;
  int64_t keys;  // M to whole groups of four vectors
  int64_t q_words, p_words;  // words of K and of M
  int64_t v_words;  // as many as panels of values have, p_words or more

  explicit Geometry(const Params& p) {
    const bool saturates = p.may_saturate(), small = small_tiles();
    split = kInt8Tiles && p.bits > 9;
    bytes = split || (p.bits <= 9 && (kInt8Dot || (kLanes >= 8 && !saturates)));
    wide = saturates && p.M > (bytes && !split ? kChunkKeysOfBytes : kChunkKeys);
    key_panels = ceil_div(p.M, kLanes), value_panels = ceil_div(p.V, kLanes);
    keys = ceil_div(p.M, 4 * kLanes) * 4 * kLanes;
    q_words = ceil_div(ceil_div(p.K, kInt8Dot ? 4 : 2), kWordsTogether) * kWordsTogether;
    p_words = ceil_div(p.M, bytes ? 4 : 2);
    v_words = p_words = ceil_div(p_words, kWordsTogether) * kWordsTogether;
    rows = static_cast<int>(std::clamp<int64_t>(kScoresOfBlock / keys, 1, kBlockRows));
    rows = std::min<int>(kBlockRows, round_up(rows, kRowsTogether));  // products have as many
    units = ceil_div(p.L, small ? rows : kUnitRows);
    unit_rows = ceil_div(ceil_div(p.L, units), kTileRows) * kTileRows;
    units = ceil_div(p.L, unit_rows);
  }
};

int64_t units(const Params& p) { return p.B * p.H * Geometry(p).units; }

class Pass {
 public:
  Pass(const Params& p, const Geometry& g, Scratch& scratch)
      : p_(p), g_(g), scores_(p.scores), rescale_(p.rescale), exp_(p.exp) {
    const int64_t rows = round_up(g.rows, kRowsTogether);
    k_ = scratch.take<int32_t>(g.key_panels * g.q_words * kLanes);
    v_ = scratch.take<int32_t>(g.value_panels * g.v_words * kLanes);
    q_ = scratch.take<char>(rows * g.q_words * 4);
    s_ = scratch.take<int32_t>(rows * g.keys);
    prob_ = scratch.take<char>(rows * p_row());
    high_ = scratch.take<char>(g.split ? rows * p_row() : 0);
    sums_ = scratch.take<int32_t>(rows * g.value_panels * kLanes);
    high_sums_ = scratch.take<int32_t>(g.split ? rows * g.value_panels * kLanes : 0);
    wide_ = scratch.take<int64_t>(g.wide ? rows * g.value_panels * kLanes : 0);
  }

  void run(int64_t begin, int64_t end) {
    [[maybe_unused]] const ProductTiles tiles;
    std::memset(q_, 0, static_cast<size_t>(round_up(g_.rows, kRowsTogether) * g_.q_words * 4));
    std::memset(prob_, 0, static_cast<size_t>(round_up(g_.rows, kRowsTogether) * p_row()));
    if (g_.split) std::memset(high_, 0, static_cast<size_t>(round_up(g_.rows, kRowsTogether) * p_row()));
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / g_.units, first = unit % g_.units * g_.unit_rows;
      const int64_t last = std::min(first + g_.unit_rows, p_.L);
      if (head != packed) pack(head / p_.H, head % p_.H);
      packed = head;
      if (last == p_.L && unit + 1 < end) fetch_head((head + 1) / p_.H, (head + 1) % p_.H);
      for (int64_t row = first; row < last; row += g_.rows)
        block(head / p_.H, head % p_.H, row, static_cast<int>(std::min<int64_t>(g_.rows, last - row)));
    }
  }

 private:
  int64_t p_row() const { return std::max(g_.keys * (g_.bytes ? 1 : 2), g_.p_words * 4); }

  // Rows of a projection are far apart: those of the next head arrive while this one is computed.
  void fetch_head(int64_t b, int64_t h) const {
    const int8_t* const k = p_.k + b * p_.k_stride_b + h * p_.k_stride_h;
    const int8_t* const v = p_.v + b * p_.v_stride_b + h * p_.v_stride_h;
    const int64_t keys = std::min<int64_t>(p_.M, kFetchedKeys);
    for (int64_t m = 0; m < keys; ++m) {
      __builtin_prefetch(k + m * p_.k_stride_l);
      __builtin_prefetch(v + m * p_.v_stride_l);
    }
  }
  void fetch_queries(int64_t b, int64_t h, int64_t row) const {
    const int8_t* const q = p_.q + b * p_.q_stride_b + h * p_.q_stride_h;
    for (int64_t i = row; i < std::min(row + g_.rows, p_.L); ++i) __builtin_prefetch(q + i * p_.q_stride_l);
  }

  void pack(int64_t b, int64_t h) {
    const int8_t* const k = p_.k + b * p_.k_stride_b + h * p_.k_stride_h;
    const int8_t* const v = p_.v + b * p_.v_stride_b + h * p_.v_stride_h;
    int32_t *const to_k = k_, *const to_v = v_;
    const int64_t k_panel = g_.q_words * kLanes, v_panel = g_.v_words * kLanes;
    if (kWordsTogether > 1) {
      std::memset(to_k, 0, static_cast<size_t>(g_.key_panels * k_panel) * 4);
      std::memset(to_v, 0, static_cast<size_t>(g_.value_panels * v_panel) * 4);
    }
    words_of_rows(reinterpret_cast<const char*>(k), p_.k_stride_l, p_.M, p_.K, [&](int64_t j, int64_t w, vi x) {
      if constexpr (kInt8Dot) {
        store(to_k + j * k_panel + w * kLanes, x ^ set1(static_cast<int32_t>(0x80808080)));
      } else {  // the last word may have no second pair
        store(to_k + j * k_panel + 2 * w * kLanes, low_pair<true>(x));
        if (4 * w + 2 < p_.K) store(to_k + j * k_panel + (2 * w + 1) * kLanes, high_pair<true>(x));
      }
    });
    const auto put = [&](int64_t j, int64_t w, vi x) { store(to_v + j * v_panel + w * kLanes, x); };
    if (g_.bytes)
      words_of_columns<4>(v, p_.v_stride_l, p_.M, p_.V, put);
    else
      words_of_columns<2>(v, p_.v_stride_l, p_.M, p_.V, put);
  }

  void block(int64_t b, int64_t h, int64_t row, int rows) {
    int32_t offsets[kBlockRows];  // of scores
    for (int r = 0; r < rows; ++r) {
      const int8_t* const from = p_.q + b * p_.q_stride_b + (row + r) * p_.q_stride_l + h * p_.q_stride_h;
      char* const to = q_ + r * g_.q_words * 4;
      if constexpr (kInt8Dot) {
        std::memcpy(to, from, static_cast<size_t>(p_.K));
        offsets[r] = 128 * sum_bytes(from, p_.K);
      } else {
        widen(from, p_.K, reinterpret_cast<int16_t*>(to), 2 * g_.q_words);
        offsets[r] = 0;
      }
    }
    fetch_queries(b, h, row + g_.rows);
    multiply_on_tiles<ScoreDot>({q_, g_.q_words * 4}, {k_, g_.q_words * kLanes}, g_.q_words, rows,
                                static_cast<int>(g_.key_panels), s_, g_.keys);
    for (int r = 0; r < rows; ++r) {
      const int32_t* const bias =
          p_.bias ? p_.bias + b % p_.W * p_.bias_stride_w + h * p_.bias_stride_h + (row + r) * p_.bias_stride_l
                  : nullptr;
      int32_t* const s = s_ + r * g_.keys;
      const int32_t top = bias ? scores<true>(s, offsets[r], bias) : scores<false>(s, offsets[r], nullptr);
      const uint32_t f = exp_.wide ? exponentials<1>(s, top) : exponentials<0>(s, top);
      const int64_t at = r * p_row();
      const uint32_t shift = static_cast<uint32_t>(32 - p_.bits);
      if (!g_.bytes) {
        probabilities(s, f, shift, reinterpret_cast<int16_t*>(prob_ + at));
      } else {
        probabilities(s, f, shift, reinterpret_cast<uint8_t*>(prob_ + at));
        if (g_.split) probabilities(s, f, shift + 8, reinterpret_cast<uint8_t*>(high_ + at));
      }
    }
    times_values(rows);
    const int64_t bytes = element_bytes(p_.out_dtype);
    for (int r = 0; r < rows; ++r) {
      char* const to = static_cast<char*>(p_.out) + ((b * p_.L + row + r) * p_.H + h) * p_.V * bytes;
      const int32_t* const sums = sums_ + r * g_.value_panels * kLanes;
      if (bytes == 4)
        put(sums, reinterpret_cast<int32_t*>(to));
      else if (bytes == 2)
        put(sums, reinterpret_cast<int16_t*>(to));
      else if (p_.out_dtype == DType::kUInt8)
        put(sums, reinterpret_cast<uint8_t*>(to));
      else
        put(sums, reinterpret_cast<int8_t*>(to));
    }
  }

  // Sums to scores, in place; the largest.
  template <bool kBias>
  int32_t scores(int32_t* s, int32_t offset, const int32_t* bias) const {
    const Rescaler rescale = scores_;
    const vi off = set1(offset);
    const int64_t M = p_.M;
    vi top = set1(INT32_MIN);
    const auto at = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      vi y = rescale(load(s + i) - off);
      if constexpr (kBias) y = saturating_sum(y, n == kLanes ? load(bias + i) : load_first(bias + i, n));
      store(s + i, y);
      top = most(top, only(y, n, INT32_MIN));
    };
    int64_t i = 0;
    for (; i + kLanes <= M; i += kLanes) at(i, kLanes);
    if (i < M) at(i, M - i);
    return fold(top, [](int32_t x, int32_t y) { return std::max(x, y); });
  }

  // Scores to exponentials, in place, 0 beyond M; the reciprocal of their sum.
  template <int kWide>
  uint32_t exponentials(int32_t* s, int32_t top) const {
    const ShiftExp e = exp_;
    const vi low = set1(lowest_of(e, top)), high = set1(top);
    const vu limit = (vu)set1(INT32_MAX);
    const int64_t M = p_.M, keys = g_.keys;
    vu sum{};
    int64_t i = 0;
    for (; i + kLanes <= M; i += kLanes) {
      const vi y = shift_exp<kWide>(e, (vi)((vu)most(load(s + i), low) - (vu)high));
      store(s + i, y);
      sum = least(sum + (vu)y, limit);
    }
    for (; i < keys; i += kLanes) {
      const vi d = (vi)((vu)most(load(s + i), low) - (vu)high);  // lanes beyond the row wrap
      const vi y = i < M ? only(shift_exp<kWide>(e, d), M - i, 0) : vi{};
      store(s + i, y);
      sum = least(sum + (vu)y, limit);
    }
    const int32_t total = fold((vi)sum, [](int32_t x, int32_t y) {
      return static_cast<int32_t>(std::min(static_cast<uint32_t>(x) + static_cast<uint32_t>(y), uint32_t{INT32_MAX}));
    });
    return static_cast<uint32_t>(INT32_MAX / total);
  }

  // e f <= 2^31 - 1: f is rounded down, and 1 where the sum was cut off.
  template <class T>
  void probabilities(const int32_t* s, uint32_t factor, uint32_t shift, T* to) const {
    const vu f = (vu)set1(static_cast<int32_t>(factor));
    const auto at = [&](int64_t i) __attribute__((always_inline)) { return ((vu)load(s + i) * f) >> shift; };
    const int64_t keys = g_.keys;
    for (int64_t i = 0; i < keys; i += 4 * kLanes)
      store_four(to + i, (vi)at(i), (vi)at(i + kLanes), (vi)at(i + 2 * kLanes), (vi)at(i + 3 * kLanes));
  }

  void times_values(int rows) {
    const int panels = static_cast<int>(g_.value_panels);
    const int64_t row = g_.value_panels * kLanes;
    const auto product = [&](const char* prob, int64_t word, int64_t words, int32_t* to) {
      const Left a = {prob + 4 * word, p_row()};
      const Right b = {v_ + word * kLanes, g_.v_words * kLanes};
      if (!g_.bytes)
        multiply<Halves>(a, b, words, rows, panels, to, row);
      else
        multiply_on_tiles<ByteDot>(a, b, words, rows, panels, to, row);
    };
    if (!g_.wide) {
      product(prob_, 0, g_.p_words, sums_);
      if (!g_.split) return;
      product(high_, 0, g_.p_words, high_sums_);
      for (int64_t i = 0; i < rows * row; ++i) sums_[i] += 256 * high_sums_[i];
      return;
    }
    const int64_t step = g_.bytes ? kChunkKeysOfBytes / 4 : kChunkKeys / 2;
    std::fill_n(wide_, rows * row, int64_t{0});
    for (int64_t word = 0; word < g_.p_words; word += step) {
      const int64_t words = std::min(step, g_.p_words - word);
      product(prob_, word, words, sums_);
      for (int64_t i = 0; i < rows * row; ++i) wide_[i] += sums_[i];
      if (!g_.split) continue;
      product(high_, word, words, high_sums_);
      for (int64_t i = 0; i < rows * row; ++i) wide_[i] += int64_t{256} * high_sums_[i];
    }
    for (int64_t i = 0; i < rows * row; ++i)
      sums_[i] = static_cast<int32_t>(std::clamp<int64_t>(wide_[i], INT32_MIN, INT32_MAX));
  }

  template <class T>
  void put(const int32_t* sums, T* to) const {
    const Rescaler rescale = rescale_;
    const int64_t V = p_.V;
    const auto at = [&](int64_t i) __attribute__((always_inline)) { return rescale(load(sums + i)); };
    int64_t i = 0;
    for (; i + 4 * kLanes <= V; i += 4 * kLanes)
      store_four(to + i, at(i), at(i + kLanes), at(i + 2 * kLanes), at(i + 3 * kLanes));
    for (; i < V; i += kLanes) store_first(to + i, rescale(load(sums + i)), V - i);
  }

  const Params& p_;
  const Geometry g_;
  const Rescaler scores_, rescale_;
  const ShiftExp exp_;
  int32_t *k_, *v_;  // [panels][words][kLanes]
  char* q_;  // [rows][q_words], words
  int32_t* s_;  // [rows][keys]
  char *prob_, *high_;  // [rows][keys], bytes or int16
  int32_t *sums_, *high_sums_;  // [rows][value_panels * kLanes]
  int64_t* wide_;  // likewise
};

void run(const Params& p, float*, int64_t begin, int64_t end) { run_pass<Pass>(p, Geometry(p), begin, end); }

constexpr Step<Params> kForward[] = {{units, run}};

}  // namespace int_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<IntAttentionParams>* EFFVIT_KERNEL_NAME(int_attention)() {
  namespace impl = EFFVIT_ISA_NAME::int_attention_impl;
  static constexpr Kernel<IntAttentionParams> kernel = {routine(impl::kForward), {}};
  return &kernel;
}
}  // namespace effvit::cpu
