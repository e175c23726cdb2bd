// pow2_linear on the CPU: forward, on raw pointers, compiled once per ISA.
//
// Where all exponents are from 0 to 6 and x is int8, weights become int8 and the int8 products run (int8_gemm.inl.h):
// codes are the index of a lookup while they are packed. kInt8Dot says that the ISA may have products of bytes.
//
// Else terms are shifted one by one, as many columns at once as a vector has lanes. With `left` the largest exponent,
// floor(x 2^p) = (x << left) >> (left - p), so that one arithmetic shift of a common vector serves exponents of either
// sign. A term of a negative weight is -t = ~t + 1: the ones are added in the end, as many as the column has negative
// weights. Rows whose |x| 2^left K could pass 2^31 - 1 are summed in int64, one column at a time.
#pragma once

#include "bytes.inl.h"
#include "int8_epilogue.inl.h"
#include "int8_tiles.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace pow2_linear_impl {

using namespace int8_impl;
using Params = Pow2LinearParams;

constexpr int kRows = 8;  // of a tile of shifts
constexpr int kRowsOfShifts = 32;  // of a unit

bool as_product(const Params& p) { return p.x_dtype == DType::kInt8 && p.bits <= 4 && p.right == 0; }

Int8LinearParams product_of(const Params& p) {
  Int8LinearParams q;
  static_cast<Int8Epilogue&>(q) = p;
  q.x = static_cast<const int8_t*>(p.x), q.K = p.K, q.x_stride_m = p.x_stride_m;
  return q;
}

int64_t packed_width(const Params& p) {  // of a block of 16 columns
  return as_product(p) ? 64 * (ceil_div(p.K, 4) + 1) : kBlock * p.K;
}
int64_t workspace(const Params& p) { return ceil_div(p.N, kBlock) * ceil_div(packed_width(p), 4); }
int64_t pack_units(const Params& p) { return ceil_div(p.N, kBlock); }

// Codes as int8 weights plus 128, in the order of int8_prepack.
void pack_product(const Params& p, uint8_t* to, int64_t block) {
  alignas(16) uint8_t values[16];  // by the low four bits of a code
  for (int i = 0; i < 16; ++i) {
    const int code = i < 8 ? i : i - 16;
    const int size = code == 0 ? 0 : 1 << ((code < 0 ? -code : code) - 1);
    values[i] = static_cast<uint8_t>(128 + (code < 0 ? -size : size));  // of -8, which no code is: 0
  }
  const vb table = broadcast_16(values);
  const int64_t groups = p.K / 4, rest = p.K % 4, stride = p.weight_stride_n;
  const int columns = static_cast<int>(std::min<int64_t>(kBlock, p.N - block * kBlock));
  const int8_t* const from = p.weight + block * kBlock * stride;
  int64_t g = 0;
  if (columns == kBlock) {
    for (; g + kLanes <= groups; g += kLanes) {
      for (int c = 0; c < kBlock; c += kLanes) {
        vf x[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const vb codes = load_vb(reinterpret_cast<const uint8_t*>(from + (c + i) * stride + 4 * g));
          x[i] = (vf)look_up_16(table, codes & set_bytes(15));
        }
        transpose_block(x);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(to + 64 * (g + i)) + c, x[i]);
      }
    }
  }
  for (; 4 * g < p.K; ++g) {
    for (int c = 0; c < kBlock; ++c) {
      const int n = c >= columns ? 0 : g < groups ? 4 : static_cast<int>(rest);
      for (int i = 0; i < 4; ++i)
        to[64 * g + 4 * c + i] = i < n ? values[static_cast<uint8_t>(from[c * stride + 4 * g + i]) & 15] : 128;
    }
  }
}

void pack(const Params& p, float* workspace, int64_t begin, int64_t end) {
  uint8_t* const to = reinterpret_cast<uint8_t*>(workspace);
  for (int64_t block = begin; block < end; ++block) {
    if (as_product(p))
      pack_product(p, to + block * packed_width(p), block);
    else
      pack_transposed<kBlock>(to, reinterpret_cast<const uint8_t*>(p.weight), p.weight_stride_n, p.N, p.K, block);
  }
}

EFFVIT_INLINE vi shift_right(vi x, vi count) {
#if defined(EFFVIT_HAS_AVX512)
  return (vi)_mm512_srav_epi32((__m512i)x, (__m512i)count);
#elif defined(EFFVIT_HAS_AVX2)
  return (vi)_mm256_srav_epi32((__m256i)x, (__m256i)count);
#else
  return x >> count;
#endif
}

// acc[kN][ld] of kN rows and kLanes columns. x: [K][kN], shifted left; w: codes, a row of 16 for every k.
template <int kN>
void shift_and_add(const int32_t* x, int64_t K, const uint8_t* w, int left, int right, int32_t* acc, int ld) {
  vi sum[kN] = {}, negative{};
  const vi offset = set1(left + right + 1), most = set1(31);  // left - p = left + right + 1 - |code|
  for (int64_t k = 0; k < K; ++k) {
    const vi code = load_integers(reinterpret_cast<const int8_t*>(w) + k * kBlock);
    const vi sign = code >> 31, there = code != 0, size = (code ^ sign) - sign;
    vi count = offset - size;
    count = count > most ? most : count;  // beyond 31 nothing changes
    negative -= sign;
#pragma GCC unroll 8
    for (int r = 0; r < kN; ++r) sum[r] += (shift_right(set1(x[k * kN + r]), count) & there) ^ sign;
  }
  for (int r = 0; r < kN; ++r) store(acc + r * ld, sum[r] + negative);
}

template <int kN>
void shift_rows(int rows, const int32_t* x, const Params& p, const uint8_t* w, int left, int32_t* acc) {
  if constexpr (kN > 1) {
    if (rows < kN) return shift_rows<kN - 1>(rows, x, p, w, left, acc);
  }
  for (int c = 0; c < kBlock; c += kLanes) shift_and_add<kN>(x, p.K, w + c, left, p.right, acc + c, kMostColumns);
}

// The sums of one row in int64: |x| 2^14 K < 2^62.
void exact_row(const int32_t* x, int64_t stride, const Params& p, const uint8_t* w, int columns, int32_t* acc) {
  for (int c = 0; c < columns; ++c) {
    int64_t sum = 0;
    for (int64_t k = 0; k < p.K; ++k) {
      const int code = static_cast<int8_t>(w[k * kBlock + c]), size = code < 0 ? -code : code;
      if (code == 0) continue;
      const int up = size - 1 - p.right;
      const int64_t v = x[k * stride], t = up >= 0 ? v * (int64_t{1} << up) : v >> -up;
      sum += code < 0 ? -t : t;
    }
    acc[c] = static_cast<int32_t>(std::max<int64_t>(-2147483648LL, std::min<int64_t>(2147483647LL, sum)));
  }
}

template <class T>
int64_t take_row(const T* x, int64_t K, int32_t* to, int64_t stride) {
  int64_t most = 0;
  for (int64_t k = 0; k < K; ++k) {
    const int64_t v = x[k];
    most = std::max(most, v < 0 ? -v : v);
    to[k * stride] = static_cast<int32_t>(v);
  }
  return most;
}

// Row `row` of x to every stride-th of `to`; the largest |x|.
int64_t take_row(const Params& p, int64_t row, int32_t* to, int64_t stride) {
  const int64_t at = row * p.x_stride_m;
  switch (p.x_dtype) {
    case DType::kInt8:
      return take_row(static_cast<const int8_t*>(p.x) + at, p.K, to, stride);
    case DType::kUInt8:
      return take_row(static_cast<const uint8_t*>(p.x) + at, p.K, to, stride);
    case DType::kInt16:
      return take_row(static_cast<const int16_t*>(p.x) + at, p.K, to, stride);
    default:
      return take_row(static_cast<const int32_t*>(p.x) + at, p.K, to, stride);
  }
}

int64_t shift_units(const Params& p) { return ceil_div(p.M, kRowsOfShifts); }

void shift_units(const Params& p, const uint8_t* w, int64_t begin, int64_t end) {
  const Finish finish = finish_of(p);
  const int left = std::max(0, (1 << (p.bits - 1)) - 2 - p.right);
  const int64_t room = 2147483647LL / std::max<int64_t>(1, p.K) >> left;
  int32_t* const x = static_cast<int32_t*>(thread_scratch(static_cast<size_t>(kRowsOfShifts * p.K * 4 + 64)));
  int32_t sums[kRows] = {};
  alignas(64) int32_t acc[kRows * kMostColumns];
  Columns columns;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit * kRowsOfShifts;
    const int rows = static_cast<int>(std::min<int64_t>(kRowsOfShifts, p.M - row));
    bool fits[kRowsOfShifts / kRows] = {};
    for (int t = 0; t < rows; t += kRows) {
      const int n = std::min(kRows, rows - t);
      int32_t* const tile = x + t * p.K;
      int64_t most = 0;
      for (int r = 0; r < n; ++r) most = std::max(most, take_row(p, row + t + r, tile + r, n));
      fits[t / kRows] = most < room;  // one less: every negative term is one too small until the end
      if (!fits[t / kRows]) continue;
      for (int64_t i = 0; i < n * p.K; ++i) tile[i] *= 1 << left;
    }
    for (int64_t block = 0; block * kBlock < p.N; ++block) {
      const int width = static_cast<int>(std::min<int64_t>(kBlock, p.N - block * kBlock));
      const uint8_t* const of_block = w + block * kBlock * p.K;
      columns.set(p, block * kBlock, width);
      for (int t = 0; t < rows; t += kRows) {
        const int n = std::min(kRows, rows - t);
        const int32_t* const tile = x + t * p.K;
        if (fits[t / kRows]) {
          shift_rows<kRows>(n, tile, p, of_block, left, acc);
        } else {
          for (int r = 0; r < n; ++r) exact_row(tile + r, n, p, of_block, width, acc + r * kMostColumns);
        }
        finish(p, acc, kMostColumns, sums, row + t, n, columns);
      }
    }
  }
}

int64_t units(const Params& p) {
  return as_product(p) ? int8_impl::units<Int8LinearParams>(product_of(p)) : shift_units(p);
}

void run(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const uint8_t* const w = reinterpret_cast<const uint8_t*>(workspace);
  if (!as_product(p)) return shift_units(p, w, begin, end);
  const Int8LinearParams q = product_of(p);
  const PackedWeights weights = {w, packed_width(p)};
#if defined(EFFVIT_HAS_INT8_DOT)
#if defined(EFFVIT_HAS_TILES)
  if (p.M > kRowsOfTile / 2) return run_units<AmxTiles>(q, weights, begin, end);
#endif
  run_units<DotTiles>(q, weights, begin, end);
#else
  run_units<HalvesTiles>(q, weights, begin, end);
#endif
}

constexpr Step<Params> kForward[] = {{pack_units, pack}, {units, run}};

}  // namespace pow2_linear_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<Pow2LinearParams>* EFFVIT_KERNEL_NAME(pow2_linear)() {
  namespace impl = EFFVIT_ISA_NAME::pow2_linear_impl;
  static constexpr Kernel<Pow2LinearParams> kernel = {routine(impl::kForward, impl::workspace), {}};
  return &kernel;
}
}  // namespace effvit::cpu
