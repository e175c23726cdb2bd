// pam_matmul on the CPU: forward, on raw pointers, compiled once per ISA.
//
// A product is one integer addition: the bits of x plus those of the weight minus those of 1, signs included, which add
// modulo 2. That holds where neither is 0 and the sum neither underflows nor overflows. A tile of rows and a block of
// columns know their largest and least numbers and whether there are zeros, and so which of three loops they need:
//   kPlain   one addition
//   kZeros   and products with zeros cleared by masks
//   kBounds  and products below 2^-126 cleared, those from 2^128 on infinite: see bounded().
// Sums are float32, of parts of K from zero, as accurate as PyTorch's.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace pam_matmul_impl {

using Params = PamMatmulParams;

constexpr int kBlock = 16;  // columns of a packed block
constexpr int kVectors = kBlock / kLanes;
constexpr int kRows = 6;  // of a tile
constexpr int kRowsOfUnit = 36;
constexpr int kPart = 64;  // of K
constexpr uint32_t kOne = 0x3f800000, kLeast = 0x00800000, kInfinity = 0x7f800000, kSign = 0x80000000;
constexpr uint32_t kUnderflow = kOne + kLeast, kOverflow = kOne + kInfinity;  // of sums of two magnitudes
constexpr int32_t kZero = static_cast<int32_t>(0u - kOne);  // a weight of 0, packed

// Of magnitudes as bits; `least` of those that are not 0.
struct Stats {
  uint32_t most = 0, least = kInfinity;
  bool zeros = false;

  // Bits without subnormal numbers.
  uint32_t add(uint32_t bits) {
    const uint32_t size = bits & ~kSign;
    if (size < kLeast) {
      zeros = true;
      return 0;
    }
    most = std::max(most, size), least = std::min(least, size);
    return bits;
  }
  bool finite() const { return most < kInfinity; }
};

struct BlockStats {
  Stats stats;
  uint32_t finite;  // a bit for every column
};

int64_t blocks(const Params& p) { return ceil_div(p.N, kBlock); }
constexpr int64_t kStatsFloats = (sizeof(BlockStats) + 3) / 4;
// Blocks of [K][16] packed weights, then a BlockStats each.
int64_t workspace(const Params& p) { return blocks(p) * (p.K * kBlock + kStatsFloats); }
BlockStats* stats_of(const Params& p, float* workspace) {
  return reinterpret_cast<BlockStats*>(workspace + blocks(p) * p.K * kBlock);
}

EFFVIT_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// A row of x or of the weight in float32, a few at a time; calls f(k, bits).
template <class T, class F>
EFFVIT_INLINE void for_bits(const T* row, int64_t K, const F& f) {
  alignas(64) T some[kLanes];
  alignas(64) float wide[kLanes];
  for (int64_t k = 0; k < K; k += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, K - k));
    if (n < kLanes) std::memset(some, 0, sizeof(some));
    std::memcpy(some, row + k, static_cast<size_t>(n) * sizeof(T));
    store(wide, load(some));
    for (int i = 0; i < n; ++i) f(k + i, bits_of(wide[i]));
  }
}

template <class T>
void pack(const Params& p, float* workspace, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    int32_t* const to = reinterpret_cast<int32_t*>(workspace) + block * p.K * kBlock;
    BlockStats of_block;
    of_block.finite = 0;
    for (int c = 0; c < kBlock; ++c) {
      const int64_t column = block * kBlock + c;
      if (column >= p.N) {
        for (int64_t k = 0; k < p.K; ++k) to[k * kBlock + c] = 0;  // 1: never looked at
        continue;
      }
      Stats stats;
      for_bits(static_cast<const T*>(p.weight) + column * p.weight_stride_n, p.K,
               [&](int64_t k, uint32_t bits) { to[k * kBlock + c] = static_cast<int32_t>(stats.add(bits) - kOne); });
      if (stats.finite()) {
        of_block.finite |= 1u << c;
        of_block.stats.most = std::max(of_block.stats.most, stats.most);
        of_block.stats.least = std::min(of_block.stats.least, stats.least);
        of_block.stats.zeros |= stats.zeros;
      } else {
        for (int64_t k = 0; k < p.K; ++k) to[k * kBlock + c] = 0;
      }
    }
    stats_of(p, workspace)[block] = of_block;
  }
}

enum Mode { kPlain, kZeros, kBounds };

// u = |x| + |w| - infinity, of bits, fits into int32: from 2 kLeast - kInfinity to 2 (kInfinity - 1) - kInfinity. The
// product is u + 2 * 0x40000000 - kOne = u + 0x40000000, if that is at least kLeast; at most infinity.
EFFVIT_INLINE vi bounded(vi x, vi w) {
  const vi full = (vi)((vu)w + static_cast<uint32_t>(kOne)), clear = set1(0x7fffffff);
  const vi a = x & clear, b = full & clear;
  vi u = (a - static_cast<int32_t>(kInfinity / 2)) + (b - static_cast<int32_t>(kInfinity / 2));
  const vi there = (u >= static_cast<int32_t>(kLeast) - 0x40000000) & (a != 0) & (b != 0);
  const vi most = set1(static_cast<int32_t>(kInfinity) - 0x40000000);
  u = u > most ? most : u;
  return ((u + 0x40000000) & there) | ((x ^ full) & ~clear);
}

// acc[kN][16] += of kN rows, k from begin to end. x: [K][kN] bits.
template <int kN, Mode kMode>
void multiply(const int32_t* x, const int32_t* w, int64_t begin, int64_t end, float* acc) {
  vf sum[kN][kVectors] = {};
  for (int64_t k = begin; k < end; ++k) {
    vi v[kVectors], there[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      v[j] = load(w + k * kBlock + j * kLanes);
      if constexpr (kMode == kZeros) there[j] = v[j] != kZero;
    }
#pragma GCC unroll 6
    for (int r = 0; r < kN; ++r) {
      const vi a = set1(x[k * kN + r]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        if constexpr (kMode == kPlain) {
          sum[r][j] += (vf)(vi)((vu)a + (vu)v[j]);
        } else if constexpr (kMode == kZeros) {
          sum[r][j] += (vf)((vi)((vu)a + (vu)v[j]) & there[j] & (a != 0));
        } else {
          sum[r][j] += (vf)bounded(a, v[j]);
        }
      }
    }
  }
  for (int r = 0; r < kN; ++r) {
    for (int j = 0; j < kVectors; ++j) {
      float* const to = acc + r * kBlock + j * kLanes;
      store(to, load(to) + sum[r][j]);
    }
  }
}

template <int kN>
void multiply_rows(int rows, Mode mode, const int32_t* x, const int32_t* w, int64_t K, float* acc) {
  if constexpr (kN > 1) {
    if (rows < kN) return multiply_rows<kN - 1>(rows, mode, x, w, K, acc);
  }
  for (int64_t k = 0; k < K; k += kPart) {
    const int64_t end = std::min<int64_t>(K, k + kPart);
    if (mode == kPlain)
      multiply<kN, kPlain>(x, w, k, end, acc);
    else if (mode == kZeros)
      multiply<kN, kZeros>(x, w, k, end, acc);
    else
      multiply<kN, kBounds>(x, w, k, end, acc);
  }
}

int64_t units(const Params& p) { return ceil_div(p.M, kRowsOfUnit); }

template <class T>
void run(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const int64_t K = p.K;
  const BlockStats* const of_blocks = stats_of(p, workspace);
  int32_t* const x = static_cast<int32_t*>(thread_scratch(static_cast<size_t>(kRowsOfUnit * K * 4 + 64)));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit * kRowsOfUnit;
    const int rows = static_cast<int>(std::min<int64_t>(kRowsOfUnit, p.M - row));
    Stats of_tiles[kRowsOfUnit / kRows];
    bool finite[kRowsOfUnit];
    for (int r = 0; r < rows; ++r) {
      const int t = r / kRows * kRows, n = std::min(kRows, rows - t);
      int32_t* const to = x + t * K + r % kRows;
      Stats stats;
      for_bits(static_cast<const T*>(p.x) + (row + r) * p.x_stride_m, K,
               [&](int64_t k, uint32_t bits) { to[k * n] = static_cast<int32_t>(stats.add(bits)); });
      finite[r] = stats.finite();
      Stats& tile = of_tiles[r / kRows];
      if (finite[r]) {
        tile.most = std::max(tile.most, stats.most), tile.least = std::min(tile.least, stats.least);
        tile.zeros |= stats.zeros;
      } else {
        for (int64_t k = 0; k < K; ++k) to[k * n] = static_cast<int32_t>(kOne);
      }
    }
    for (int64_t block = 0; block < blocks(p); ++block) {
      const int32_t* const w = reinterpret_cast<const int32_t*>(workspace) + block * K * kBlock;
      const BlockStats& b = of_blocks[block];
      const int columns = static_cast<int>(std::min<int64_t>(kBlock, p.N - block * kBlock));
      for (int t = 0; t < rows; t += kRows) {
        const Stats& a = of_tiles[t / kRows];
        const bool bounds = a.most + b.stats.most >= kOverflow || a.least + b.stats.least < kUnderflow;
        const Mode mode = bounds ? kBounds : a.zeros || b.stats.zeros ? kZeros : kPlain;
        const int n = std::min(kRows, rows - t);
        alignas(64) float acc[kRows * kBlock] = {};
        multiply_rows<kRows>(n, mode, x + t * K, w, K, acc);
        for (int r = 0; r < n; ++r) {
          float* const from = acc + r * kBlock;
          for (int c = 0; c < columns; ++c) {
            if (!finite[t + r] || !(b.finite >> c & 1)) from[c] = __builtin_nanf("");
          }
          T* const to = static_cast<T*>(p.out) + (row + t + r) * p.N + block * kBlock;
          alignas(64) T some[kBlock];
          for (int c = 0; c < kBlock; c += kLanes) store(some + c, load(from + c));
          std::memcpy(to, some, static_cast<size_t>(columns) * sizeof(T));
        }
      }
    }
  }
}

void pack_step(const Params& p, float* workspace, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) { pack<decltype(type)>(p, workspace, begin, end); });
}
void run_step(const Params& p, float* workspace, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto type) { run<decltype(type)>(p, workspace, begin, end); });
}

constexpr Step<Params> kForward[] = {{blocks, pack_step}, {units, run_step}};

}  // namespace pam_matmul_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<PamMatmulParams>* EFFVIT_KERNEL_NAME(pam_matmul)() {
  namespace impl = EFFVIT_ISA_NAME::pam_matmul_impl;
  static constexpr Kernel<PamMatmulParams> kernel = {routine(impl::kForward, impl::workspace), {}};
  return &kernel;
}
}  // namespace effvit::cpu
