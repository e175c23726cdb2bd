// binary_linear on the CPU: forward, on raw pointers, compiled once per ISA.
//
// Bits are counted by lookups: for four bits of x, a table of 16 bytes has for any four bits of a weight how many of
// their xor (unipolar: their and) are set. A vector of weights is one byte of as many columns; a shuffle looks all of
// them up at once, a third of the instructions of xor and a popcount of bytes. Counts of a byte stay below 256 for 31
// bytes along K, 8 in each; then they are added to int32.
#pragma once

#include "bytes.inl.h"
#include "int8_epilogue.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace binary_linear_impl {

using namespace int8_impl;
using Params = BinaryLinearParams;

constexpr int kBlock = kMostColumns;  // columns of a packed block
constexpr int kVectors = kBlock / kBytes;
constexpr int kRows = kLanes == 16 ? 8 : 4;  // of a tile: 32 or 16 registers
constexpr int kRowsOfChunk = 64;
constexpr int kMostBytes = 31;  // 31 * 8 < 256
constexpr int64_t kUnitBits = 1 << 24;  // of a unit of work, about

struct Chunks {
  int64_t rows, blocks, m, n;  // rows and blocks of columns of a unit; units

  explicit Chunks(const Params& p) {
    rows = small_tiles() ? kRows : kRowsOfChunk;
    const int64_t most = ceil_div(p.N, kBlock), of_block = std::min(rows, p.M) * kBlock * (p.depth + 1);
    blocks = small_tiles() ? 1 : std::min(most, std::max<int64_t>(1, kUnitBits / of_block));
    m = ceil_div(p.M, rows), n = ceil_div(most, blocks);
  }
};

// Which bits of the last byte count.
uint8_t last_bits(const Params& p) { return static_cast<uint8_t>(p.depth % 8 ? (1 << p.depth % 8) - 1 : 255); }

// Weights as [ceil(N / 64)][V][64] bytes, zeros beyond N.
int64_t workspace(const Params& p) { return ceil_div(p.N, kBlock) * p.V * kBlock / 4; }
int64_t pack_units(const Params& p) { return ceil_div(p.N, kBlock); }

void pack(const Params& p, float* workspace, int64_t begin, int64_t end) {
  uint8_t* const to = reinterpret_cast<uint8_t*>(workspace);
  for (int64_t block = begin; block < end; ++block)
    pack_transposed<kBlock>(to, p.weight, p.weight_stride_n, p.N, p.V, block, last_bits(p));
}

// tables[a][b]: how many bits of a ^ b are set, or of a & b.
struct Tables {
  alignas(64) uint8_t counts[16][16];

  explicit Tables(bool unipolar) {
    for (int a = 0; a < 16; ++a) {
      for (int b = 0; b < 16; ++b)
        counts[a][b] = static_cast<uint8_t>(__builtin_popcount(static_cast<unsigned>(unipolar ? a & b : a ^ b)));
    }
  }
};

// acc[kN][64] = counts of kN rows and a block. `at`: [V][kN][2], where the tables of the two halves of a byte of x are.
template <int kN>
void count(const uint8_t* tables, const uint8_t* at, int64_t V, const uint8_t* w, int32_t* acc) {
  const vb low = set_bytes(15);
  for (int i = 0; i < kN * kBlock; i += kLanes) store(acc + i, vi{});
  for (int64_t begin = 0; begin < V; begin += kMostBytes) {
    const int64_t end = std::min(V, begin + kMostBytes);
    vb sum[kN][kVectors] = {};
    for (int64_t b = begin; b < end; ++b) {
      vb lows[kVectors], highs[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const vb v = load_vb(w + b * kBlock + j * kBytes);
        lows[j] = v & low, highs[j] = high_nibbles(v);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kN; ++r) {
        const uint8_t* const of_row = at + (b * kN + r) * 2;
        const vb a = broadcast_16(tables + of_row[0]), c = broadcast_16(tables + of_row[1]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[r][j] += look_up_16(a, lows[j]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) sum[r][j] += look_up_16(c, highs[j]);
      }
    }
    alignas(64) uint8_t bytes[kBlock];
    for (int r = 0; r < kN; ++r) {
      for (int j = 0; j < kVectors; ++j) store_vb(bytes + j * kBytes, sum[r][j]);
      int32_t* const to = acc + r * kBlock;
      for (int i = 0; i < kBlock; i += kLanes) store(to + i, load(to + i) + load_integers(bytes + i));
    }
  }
}

template <int kN>
void count_rows(int rows, const uint8_t* tables, const uint8_t* at, int64_t V, const uint8_t* w, int32_t* acc) {
  if constexpr (kN > 1) {
    if (rows < kN) return count_rows<kN - 1>(rows, tables, at, V, w, acc);
  }
  count<kN>(tables, at, V, w, acc);
}

void run(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const Finish finish = finish_of(p);
  const Chunks chunks(p);
  const Tables tables(p.unipolar);
  const uint8_t last = last_bits(p);
  const int64_t V = p.V;
  uint8_t* const at = static_cast<uint8_t*>(thread_scratch(static_cast<size_t>(2 * kRowsOfChunk * V + 64)));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / chunks.n * chunks.rows;
    const int rows = static_cast<int>(std::min(chunks.rows, p.M - row));
    int32_t sums[kRowsOfChunk];  // what is to be taken off: -depth, or how many bits of the row are set
    for (int t = 0; t < rows; t += kRows) {
      const int n = std::min(kRows, rows - t);
      uint8_t* const tile = at + 2 * t * V;
      for (int r = 0; r < n; ++r) {
        const uint8_t* const x = p.x + (row + t + r) * p.x_stride_m;
        int32_t set = 0;
        for (int64_t b = 0; b < V; ++b) {
          const unsigned byte = b + 1 == V ? x[b] & last : x[b];
          tile[(b * n + r) * 2] = static_cast<uint8_t>(byte << 4);
          tile[(b * n + r) * 2 + 1] = static_cast<uint8_t>(byte & 0xf0);
          if (p.unipolar) set += __builtin_popcount(byte);
        }
        sums[t + r] = p.unipolar ? set : static_cast<int32_t>(-p.depth);
      }
    }
    const int32_t factor = p.unipolar ? 2 : -2;
    alignas(64) int32_t acc[kRows * kBlock];
    Columns columns;
    const int64_t first = unit % chunks.n * chunks.blocks;
    for (int64_t block = first; block < first + chunks.blocks && block * kBlock < p.N; ++block) {
      const uint8_t* const w = reinterpret_cast<const uint8_t*>(workspace) + block * V * kBlock;
      columns.set(p, block * kBlock, static_cast<int>(std::min<int64_t>(kBlock, p.N - block * kBlock)));
      for (int t = 0; t < rows; t += kRows) {
        const int n = std::min(kRows, rows - t);
        count_rows<kRows>(n, tables.counts[0], at + 2 * t * V, V, w, acc);
        for (int i = 0; i < n * kBlock; i += kLanes) store(acc + i, load(acc + i) * factor);
        finish(p, acc, kBlock, sums + t, row + t, n, columns);
      }
    }
  }
}

int64_t units(const Params& p) {
  const Chunks chunks(p);
  return chunks.m * chunks.n;
}

constexpr Step<Params> kForward[] = {{pack_units, pack}, {units, run}};

}  // namespace binary_linear_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<BinaryLinearParams>* EFFVIT_KERNEL_NAME(binary_linear)() {
  namespace impl = EFFVIT_ISA_NAME::binary_linear_impl;
  static constexpr Kernel<BinaryLinearParams> kernel = {routine(impl::kForward, impl::workspace), {}};
  return &kernel;
}
}  // namespace effvit::cpu
