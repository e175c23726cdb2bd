// table_lookup on the CPU: forward, on raw pointers, compiled once per ISA.
//
// A table is 16 parts of 16 entries, which a shuffle looks up at once. With y = x - 16 j as a saturating signed byte, a
// shuffle gives 0 where y < 0, and else an entry by the low four bits, those of x. Part j is stored as its xor with
// part j - 1, so that the xor over all j with y >= 0 is the entry of x's own part: eight parts for x < 128, and eight
// more with x - 128 for the rest. Three instructions a part, no comparison.
#pragma once

#include "bytes.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace table_lookup_impl {

using Params = TableLookupParams;

constexpr int64_t kUnit = 1 << 16;  // bytes of a unit of work, about
constexpr int kVectors = 4;  // that share a part

#if EFFVIT_LANES > 4

// x - 16 of signed bytes, at least -128.
EFFVIT_INLINE vb next_part(vb x) {
#if defined(EFFVIT_HAS_AVX512)
  return (vb)_mm512_subs_epi8((__m512i)x, _mm512_set1_epi8(16));
#elif defined(EFFVIT_HAS_AVX2)
  return (vb)_mm256_subs_epi8((__m256i)x, _mm256_set1_epi8(16));
#else
  int8_t s[kBytes];
  std::memcpy(s, &x, sizeof(s));
  for (int i = 0; i < kBytes; ++i) s[i] = static_cast<int8_t>(s[i] < -112 ? -128 : s[i] - 16);
  std::memcpy(&x, s, sizeof(s));
  return x;
#endif
}

class Table {
 public:
  explicit Table(bool is_signed) : flip_(is_signed ? 128 : 0) {}
  void set(const uint8_t* table) {
    if (table == table_) return;
    table_ = table;
    for (int i = 0; i < 256; ++i) parts_[i] = static_cast<uint8_t>(table[i] ^ (i % 128 < 16 ? 0 : table[i - 16]));
  }

  void look_up(const uint8_t* x, uint8_t* out, int64_t n) const {
    int64_t i = 0;
    for (; i + kVectors * kBytes <= n; i += kVectors * kBytes) vectors<kVectors>(x + i, out + i);
    for (; i + kBytes <= n; i += kBytes) vectors<1>(x + i, out + i);
    if (i == n) return;
    uint8_t some[kBytes] = {};
    std::memcpy(some, x + i, static_cast<size_t>(n - i));
    vectors<1>(some, some);
    std::memcpy(out + i, some, static_cast<size_t>(n - i));
  }

 private:
  template <int kN>
  EFFVIT_INLINE void vectors(const uint8_t* x, uint8_t* out) const {
    vb result[kN] = {};
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      vb y[kN];
#pragma GCC unroll 4
      for (int v = 0; v < kN; ++v) {
        y[v] = load_vb(x + v * kBytes) ^ set_bytes(static_cast<uint8_t>(half ? flip_ ^ 128 : flip_));
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const vb part = broadcast_16(parts_ + 128 * half + 16 * j);
#pragma GCC unroll 4
        for (int v = 0; v < kN; ++v) {
          result[v] ^= look_up_16(part, y[v]);
          y[v] = next_part(y[v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kN; ++v) store_vb(out + v * kBytes, result[v]);
  }

  const uint8_t* table_ = nullptr;
  uint8_t flip_;
  alignas(64) uint8_t parts_[256];
};

#else

class Table {
 public:
  explicit Table(bool is_signed) : flip_(is_signed ? 128 : 0) {}
  void set(const uint8_t* table) { table_ = table; }
  void look_up(const uint8_t* x, uint8_t* out, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) out[i] = table_[x[i] ^ flip_];
  }

 private:
  const uint8_t* table_ = nullptr;
  uint8_t flip_;
};

#endif

// Rows that lie behind each other and share a table are one.
Params flat(Params p) {
  if (p.which || p.dims > 1 || (p.dims == 1 && p.x_stride[0] != p.columns)) return p;
  p.columns *= p.rows, p.rows = 1, p.dims = 0;
  return p;
}

// A long row is several units.
int64_t units_of_row(const Params& p) { return ceil_div(p.columns, kUnit); }
int64_t rows_of_unit(const Params& p) { return std::max<int64_t>(1, kUnit / p.columns); }
int64_t units(const Params& given) {
  const Params p = flat(given);
  return p.columns > kUnit ? p.rows * units_of_row(p) : ceil_div(p.rows, rows_of_unit(p));
}

void run(const Params& given, float*, int64_t begin, int64_t end) {
  const Params p = flat(given);
  Table table(p.is_signed);
  const auto part = [&](int64_t row, int64_t from, int64_t to) {
    const int64_t which = p.which ? p.which[row_start(p, p.which_stride, row)] : 0;
    table.set(p.table + 256 * which);
    const uint8_t* const x = p.x + row_start(p, p.x_stride, row);
    table.look_up(x + from, p.out + row * p.columns + from, to - from);
  };
  if (p.columns > kUnit) {
    const int64_t parts = units_of_row(p);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t from = unit % parts * kUnit;
      part(unit / parts, from, std::min(p.columns, from + kUnit));
    }
    return;
  }
  const int64_t rows = rows_of_unit(p);
  for (int64_t row = begin * rows; row < std::min(end * rows, p.rows); ++row) part(row, 0, p.columns);
}

constexpr Step<Params> kForward[] = {{units, run}};

}  // namespace table_lookup_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<TableLookupParams>* EFFVIT_KERNEL_NAME(table_lookup)() {
  namespace impl = EFFVIT_ISA_NAME::table_lookup_impl;
  static constexpr Kernel<TableLookupParams> kernel = {routine(impl::kForward), {}};
  return &kernel;
}
}  // namespace effvit::cpu
