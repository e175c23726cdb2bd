// Attention of int8, block of keys by block of keys. See int8_attention.cuh.
//
// What leads to an integer is rounded after every operation, as the definition says: prim::product keeps the compiler
// from making a multiply-add of it. Where one is written it is exact up to its last operation, and a comment says why.
#pragma once
#include "int8_attention_common.cuh"

namespace effvit {
namespace cuda {
namespace int8_attention_impl {

// kDim: columns of the tiles, of queries and keys as of values.
template <int kDim_, int kMinCtas_>
struct Shape {
  static constexpr int kDim = kDim_, kMinCtas = kMinCtas_, kStages = 2, kStride = row_stride<int8_t>(kDim);
  static constexpr int kChunks = kDim / 16;  // of 16 channels
  // Places in shared memory, in bytes.
  static constexpr int kTileBytes = kTile * kStride, kStageBytes = 2 * kTileBytes + 4 * kDim;
  static constexpr int kStage = kTileBytes, kRowFloats = kStage + kStages * kStageBytes;
  static constexpr int kSharedBytes = kRowFloats + 2 * kTile * 4;
  static_assert(conflict_free<int8_t>(kDim), "row stride must be an odd multiple of 16 bytes");
};
using Dims64 = Shape<64, 3>;
using Dims128 = Shape<128, 2>;
using Dims256 = Shape<256, 1>;

// ---- scores to weights ----

// Integers as bits of floats: 2^23 + x and 1.5 * 2^23 + x, of 0 <= x < 2^23 and |x| < 2^22. A tensor core adds to such
// bits as well: |q k| <= 127 * 128 * 256 < 2^22, and |p v| <= 127 * 128 * 64.
constexpr int32_t kPositiveBits = 0x4b000000, kSignedBits = 0x4b400000;
constexpr float kPositive = 8388608.f, kSigned = 12582912.f;
static_assert(127 * 128 * kMaxDim < 1 << 22 && 127 * 128 * kAttentionBlock < 1 << 22, "sums fit a float's fraction");

// Steps of 2^-13 below the maximum, t, are kept as the bits of 2^23 + 7 * 2^13 + t: then bits 0 to 12 are the fraction
// of t, and what is above, modulo 32, is 7 and its whole part.
constexpr float kStepOffset = kPositive + 7 * 8192.f;

// Both exponentials give twice the weight, or one more: 0 to 254; see halve.
//
// exp2: c - ((a f + 2^14) >> 15) with f in steps of 2^-15 is (c 2^13 + 2^12 - 1 - a f) >> 13 with f in steps of 2^-13,
// for -floor(x / n) = floor((n - 1 - x) / n). Every other number is kept negative, so that products are added.
EFFVIT_DEVICE uint32_t exp2_twice(uint32_t bits) {
  const int32_t f = static_cast<int32_t>(bits & 0x1fffu);
  const int32_t a = (7494 * 8192 + 4095 - 1273 * f) >> 13;
  const int32_t b = (a * f + 8191 - (22478 * 8192 + 4095)) >> 13;  // negative
  const int32_t c = (32512 * 8192 + 4095 + b * f) >> 13;
  return prim::shift_right(static_cast<uint32_t>(c), bits >> 13);
}
// I-ViT's: 127 * 2^21 < 2^31.
EFFVIT_DEVICE uint32_t shiftmax_twice(uint32_t bits) {
  const uint32_t t = bits - (static_cast<uint32_t>(kPositiveBits) + 7 * 8192);
  const uint32_t all = t + ((t + 1) >> 1) - ((t + 15) >> 4), u = all < 65536 ? all : 65536;
  return 127 * (((16384 - (u & 8191)) << (8 - (u >> 13))) >> 1) >> 20;
}
// (x + 1) / 2 of four bytes.
EFFVIT_DEVICE uint32_t halve(uint32_t x) { return ((x + 0x01010101u) >> 1) & 0x7f7f7f7fu; }

// Where a row lies: query l of a head.
struct RowPlace {
  int64_t l, head;
};
EFFVIT_DEVICE RowPlace place_of(const Plan& g, int64_t group, int64_t row) {
  const int64_t l = row / g.E;
  return {l, group * g.E + (row - l * g.E)};
}

// What a lane knows of its two rows: acc_row() and acc_row() + 8.
struct LaneRows {
  int64_t last[2];  // the last key that the row sees; -1: none, or there is no such row
  int64_t bias[2];  // where its bias starts
  float scale[2];  // of its integers, with that of the scores
};

template <bool kBias>
EFFVIT_DEVICE LaneRows lane_rows(const Plan& g, int64_t b, int64_t group, int64_t first, const Shared<float>& scale) {
  LaneRows r = {};
  EFFVIT_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int64_t row = first + acc_row() + 8 * i;
    const RowPlace at = place_of(g, group, least(row, g.rows - 1));
    r.last[i] = row < g.rows ? visible_keys(g.p, at.l) - 1 : -1;
    if (kBias) r.bias[i] = b % g.p.W * g.p.bias_stride_w + at.head * g.p.bias_stride_h + at.l * g.p.bias_stride_l;
    r.scale[i] = scale.load(acc_row() + 8 * i);
  }
  return r;
}

// Scores as integers of this warp's rows and a block of keys.
template <class S>
EFFVIT_DEVICE void multiply(int32_t (&s)[kTiles][4], const Shared<int8_t>& q, const Shared<int8_t>& k, int depth) {
  const Ldmatrix at;
  const int q_at = (tile::warp_row() + at.low + at.half) * S::kStride + 2 * at.quarter;
  const int k_at = (at.low + at.quarter) * S::kStride + 2 * at.half;
  EFFVIT_NO_UNROLL
  for (int d = 0; d < depth; d += 32) {
    uint32_t a[4];
    prim::ldmatrix_x4<false>(a, q, q_at + d);
    EFFVIT_UNROLL
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      prim::ldmatrix_x4<false>(b, k, k_at + n * 8 * S::kStride + d);
      prim::mma_m16n8k32(s[n], a, b[0], b[1]);
      prim::mma_m16n8k32(s[n + 1], a, b[2], b[3]);
    }
  }
}

// A row's weights as operands of P V: lane (g, t) holds keys 8 n + 2 t and the next of tile n, and as operands the
// bytes 4 t.. of two tiles each. So the depth of the second product is a permutation of the keys, and V's fragments
// have the same: see add_values.
using Weights = uint32_t[2][4];

template <bool kMasked>
EFFVIT_DEVICE bool sees(const int (&left)[2], int n, int e) {
  return !kMasked || 8 * n + e % 2 <= left[e / 2];
}

// From steps below the maximum to weights. f(n, e) gives the steps, as a float that may be no number.
template <bool kMasked, class Steps>
EFFVIT_DEVICE void exponentials(Weights& p, bool shiftmax, const int (&left)[2], const Steps& steps) {
  const auto each = [&](const auto& twice) {
    EFFVIT_UNROLL
    for (int n = 0; n < kTiles; n += 2) {
      EFFVIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint32_t x[4];
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int tile = n + e / 2, at = 2 * half + e % 2;
          x[e] = twice(prim::bit_cast<uint32_t>(steps(tile, at) + kStepOffset));
          if (!sees<kMasked>(left, tile, at)) x[e] = 0;
        }
        p[n / 4][n % 4 + half] = halve(pack_bytes(x[0], x[1], x[2], x[3]));
      }
    }
  };
  if (shiftmax) {
    each([&](uint32_t bits) { return shiftmax_twice(bits); });
  } else {
    each([&](uint32_t bits) { return exp2_twice(bits); });
  }
}

// left: by how much a row's last key is beyond this lane's first key of the block.
template <bool kMasked>
EFFVIT_DEVICE void weigh(const Plan& g, const int32_t (&s)[kTiles][4], const float (&c)[2], const int (&left)[2],
                         Weights& p, float (&maximum)[2]) {
  constexpr int32_t kNone = -(1 << 30);
  const float limit = g.p.shiftmax ? kShiftmaxLimit : kExp2Limit;
  int32_t seen[2] = {kNone, kNone}, top_bits[2];
  float factor[2], minus[2];
  EFFVIT_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (sees<kMasked>(left, n, e)) seen[e / 2] = larger(seen[e / 2], s[n][e]);
    }
  }
  EFFVIT_UNROLL
  for (int i = 0; i < 2; ++i) {
    seen[i] = largest_of<4>(seen[i]);
    const bool none = kMasked && seen[i] == kNone;
    if (none) seen[i] = 0;
    maximum[i] = none ? -infinity() : static_cast<float>(seen[i]) * c[i];
    top_bits[i] = kPositiveBits + seen[i];
    // Beyond 10^6 any step is beyond the limit; 2^23 times it must not be infinite.
    factor[i] = fminf(c[i] * g.p.step, 1e6f);
    minus[i] = -kPositive * factor[i];
  }
  // (2^23 + d) factor - 2^23 factor is d factor, rounded once: 2^23 factor is exact.
  exponentials<kMasked>(p, g.p.shiftmax, left, [&](int n, int e) {
    const int i = e / 2;
    return fminf(fmaf(prim::bit_cast<float>(top_bits[i] - s[n][e]), factor[i], minus[i]), limit);
  });
}

EFFVIT_DEVICE float larger_or_nan(float a, float b) { return a > b || a != a ? a : b; }

// The same with a bias, for any block. The sums began at kSignedBits.
EFFVIT_DEVICE void weigh_biased(const Plan& g, const int32_t (&s)[kTiles][4], const float (&c)[2], const int (&left)[2],
                                const int64_t (&bias)[2], Weights& p, float (&maximum)[2]) {
  const float limit = g.p.shiftmax ? kShiftmaxLimit : kExp2Limit;
  float y[kTiles][4], top[2] = {-infinity(), -infinity()}, most[2];
  EFFVIT_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int i = e / 2;
      const bool seen = sees<true>(left, n, e);
      const float b = seen ? load_small(g.p.bias, bias[i] + 8 * n + e % 2, g.p.bias_dtype) : 0.f;
      y[n][e] = prim::product(prim::bit_cast<float>(s[n][e]) - kSigned, c[i]) + prim::product(b, kLog2e);
      if (!seen) y[n][e] = -infinity();
      top[i] = larger_or_nan(y[n][e], top[i]);
    }
  }
  EFFVIT_UNROLL
  for (int i = 0; i < 2; ++i) {
    EFFVIT_UNROLL
    for (int m = 2; m > 0; m /= 2) top[i] = larger_or_nan(prim::shuffle_xor(top[i], m), top[i]);
    maximum[i] = top[i];
    most[i] = top[i] == -infinity() ? 0.f : top[i];
  }
  exponentials<true>(p, g.p.shiftmax, left,
                     [&](int n, int e) { return fminf(prim::product(most[e / 2] - y[n][e], g.p.step), limit); });
}

// out = keep out + weight P V, of 16 channels at a time. ldmatrix, transposed, gives a lane two keys of two channels as
// bytes: of key tiles 4 s to 4 s + 3 those of channels 2 g and 2 g + 1. So even channels are one tile of the product,
// odd ones another, and a lane has channels 4 t to 4 t + 3 of the results.
template <class S>
EFFVIT_DEVICE void add_values(float (&out)[S::kChunks][2][4], const Weights& p, const Shared<int8_t>& v,
                              const Shared<float>& v_scale, int channels, const float (&keep)[2],
                              const float (&weight)[2]) {
  EFFVIT_UNROLL
  for (int c = 0; c < S::kChunks; ++c) {
    if (16 * c < channels) {
      int32_t even[4], odd[4];
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) even[e] = odd[e] = kSignedBits;
      EFFVIT_UNROLL
      for (int s = 0; s < 2; ++s) {
        uint32_t b[4];
        prim::ldmatrix_x4<true>(b, v, (32 * s + prim::lane_id()) * S::kStride + 16 * c);
        prim::mma_m16n8k32(even, p[s], prim::permute_bytes(b[0], b[1], 0x6420),
                           prim::permute_bytes(b[2], b[3], 0x6420));
        prim::mma_m16n8k32(odd, p[s], prim::permute_bytes(b[0], b[1], 0x7531), prim::permute_bytes(b[2], b[3], 0x7531));
      }
      const auto scale = v_scale.template load_vec<Vec<float, 4>>(16 * c + prim::lane_id() % 4 * 4);
      EFFVIT_UNROLL
      for (int i = 0; i < 2; ++i) {
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int32_t bits = e % 2 == 0 ? even[2 * i + e / 2] : odd[2 * i + e / 2];
          const float sum = prim::bit_cast<float>(bits) - kSigned;
          out[c][i][e] = fmaf(out[c][i][e], keep[i], sum * weight[i] * scale.v[e]);
        }
      }
    }
  }
}

// ---- the kernel ----

// Queries of this warp's rows in steps of their largest number, with the scale of each row and the part of its scores
// that the keys' mean takes.
template <class S>
EFFVIT_DEVICE void load_queries(const Plan& g, const Shared<int8_t>& q, const Shared<float>& scale,
                                const Shared<float>& part, int64_t pair, int64_t first) {
  constexpr int kFours = S::kDim / 64;
  const int lane = prim::lane_id() % 16, K = static_cast<int>(g.p.K);
  const int64_t b = pair / g.p.G, group = pair - b * g.p.G;
  EFFVIT_NO_UNROLL
  for (int i = 0; i < 16; i += 2) {
    const int row = tile::warp_row() + i + prim::lane_id() / 16;
    const int64_t at = first + row;
    const bool exists = at < g.rows;
    const int64_t l = exists ? at / g.E : 0, head = group * g.E + (exists ? at - l * g.E : 0);
    const int64_t offset = b * g.p.q_stride_b + l * g.p.q_stride_l + head * g.p.q_stride_h;
    float x[kFours][4], sum = 0.f;
    int32_t largest = 0;
    EFFVIT_UNROLL
    for (int f = 0; f < kFours; ++f) {
      const int col = 64 * f + 4 * lane, n = exists ? K - col : 0;
      load_four(g.p.q, g.p.dtype, offset + col, n, g.q_vec && n >= 4, x[f]);
      float m[4] = {};
      if (g.mean != nullptr) load_four(g.mean + pair * K + col, n, g.mean_vec && n >= 4, m);
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) {
        largest = larger(largest, magnitude_bits(x[f][e]));
        sum += x[f][e] * m[e];
      }
    }
    largest = largest_of<16>(largest);
    sum = prim::warp_sum<16>(sum);
    const Quantiser to_steps(largest);
    EFFVIT_UNROLL
    for (int f = 0; f < kFours; ++f) q.store_vec(row * S::kStride + 64 * f + 4 * lane, to_steps.four(x[f]));
    if (lane == 0) scale.store(row, to_steps.step * g.p.base2_scale), part.store(row, g.p.scale * sum);
  }
}

// Starts to copy rows [row, row + 64) of a head, zeros beyond M and beyond its columns. A loop with one address: those
// of an unrolled one would be kept in registers.
template <class S>
EFFVIT_DEVICE void load_rows(const Shared<int8_t>& to, const Integers8& from, int64_t b, int64_t group, int64_t row,
                             int64_t M) {
  constexpr int kPieces = S::kDim / kVec<int8_t>, kStep = kThreads / kPieces;
  const int first = prim::thread_id() / kPieces, col = prim::thread_id() % kPieces * kVec<int8_t>;
  const int n = piece_length<int8_t>(from.cols - col), rows = static_cast<int>(least(kTile, M - row));
  const int8_t* p = from.base + b * from.stride_b + group * from.stride_h + (row + first) * from.stride_m + col;
  EFFVIT_NO_UNROLL
  for (int r = first; r < kTile; r += kStep) {
    const int exist = r < rows ? n : 0, at = r * S::kStride + col;
    if (from.vec) {
      prim::cp_async16(to, at, p, exist);
    } else {
      to.store_vec(at, load_piece(p, exist, false));
    }
    p += kStep * from.stride_m;
  }
}

template <class S>
EFFVIT_DEVICE void load_block(const Plan& g, int64_t b, int64_t group, int64_t n, const Shared<int8_t>& to,
                              const Shared<int8_t>& scales) {
  load_rows<S>(to, g.k, b, group, n * kTile, g.p.M);
  load_rows<S>(to.from(S::kTileBytes), g.v, b, group, n * kTile, g.p.M);
  const int64_t scale_row = (b * g.p.N + n) * g.p.G + group;
  const Matrix scale = {reinterpret_cast<const int8_t*>(g.v_scale + scale_row * g.v_scale_cols), 1, 0,
                        4 * g.v_scale_cols, g.v_scale_vec};
  load_tile<1, 4 * S::kDim, 0, kThreads>(scales, scale, 0, 0);
}

// What a CTA works on. Integers, which are kept in registers: none of these counts reaches 2^31 in memory that there
// is.
struct Unit {
  int b, group, split, row_block;
  EFFVIT_DEVICE Unit(const Plan& g, int64_t id) {
    row_block = static_cast<int>(g.row_blocks - 1 - take_index(id, g.row_blocks));  // long rows of causal calls first
    split = static_cast<int>(take_index(id, g.splits));
    group = static_cast<int>(take_index(id, g.p.G));
    b = static_cast<int>(id);
  }
  EFFVIT_DEVICE int64_t first() const { return static_cast<int64_t>(row_block) * kTile; }
  EFFVIT_DEVICE int64_t pair(const Plan& g) const { return b * g.p.G + group; }
};

template <class S, bool kBias>
EFFVIT_KERNEL(kThreads, S::kMinCtas)
int8_attention_fwd_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const Shared<int8_t> q(0, S::kTileBytes);
  const Shared<float> row_scale(S::kRowFloats, kTile), row_part(S::kRowFloats + 4 * kTile, kTile);
  const auto stage = [&](int n) { return Shared<int8_t>(S::kStage + n % S::kStages * S::kStageBytes, S::kStageBytes); };
  const auto stage_scales = [&](int n) {
    return Shared<float>(S::kStage + n % S::kStages * S::kStageBytes + 2 * S::kTileBytes, S::kDim);
  };
  const int depth = static_cast<int>(ceil_div(g.p.K, 32)) * 32, channels = static_cast<int>(g.p.V);
  EFFVIT_NO_UNROLL
  for (int64_t unit = prim::cta_id(); unit < g.units; unit += prim::cta_count()) {
    const Unit u(g, unit);
    // Blocks [start, whole) are seen by all rows, [whole, stop) by some of them or in part.
    const int64_t last_row = least(u.first() + kTile, g.rows) - 1, end = least((u.split + 1) * g.walk, g.p.N);
    const int start = static_cast<int>(u.split * g.walk);
    const int stop = static_cast<int>(least(end, ceil_div(visible_keys(g.p, last_row / g.E), kTile)));
    const int whole =
        S::kDim == kMaxDim ? 0 : static_cast<int>(visible_keys(g.p, u.first() / g.E) / kTile);  // registers
    const auto load = [&](int n) {
      if (n < stop) {
        const Shared<int8_t> to = stage(n);
        load_block<S>(g, u.b, u.group, n, to, to.from(2 * S::kTileBytes));
      }
      prim::cp_async_commit();
    };

    prim::sync_threads();  // the previous unit's readers
    load(start);
    load_queries<S>(g, q, row_scale, row_part, u.pair(g), u.first());
    prim::sync_warp();  // a warp reads its own rows
    const LaneRows r = lane_rows<kBias>(g, u.b, u.group, u.first(), row_scale);

    float out[S::kChunks][2][4] = {}, top[2] = {-infinity(), -infinity()}, total[2] = {0.f, 0.f};
    EFFVIT_NO_UNROLL
    for (int n = start; n < stop; ++n) {
      const float k_scale = prim::load_global(g.k_scale + (u.b * g.p.N + n) * g.p.G + u.group);
      prim::cp_async_wait<0>();
      prim::sync_threads();  // this block's tiles, and the last block's readers, over which it copies
      load(n + 1);
      const Shared<int8_t> k = stage(n);

      int32_t s[kTiles][4];
      EFFVIT_UNROLL
      for (int i = 0; i < 4 * kTiles; ++i) s[i / 4][i % 4] = kBias ? kSignedBits : 0;
      multiply<S>(s, q, k, depth);

      const float c[2] = {r.scale[0] * k_scale, r.scale[1] * k_scale};
      const int64_t key = static_cast<int64_t>(n) * kTile + acc_col();
      int left[2];
      EFFVIT_UNROLL
      for (int i = 0; i < 2; ++i) left[i] = static_cast<int>(most(-1, least(r.last[i] - key, kTile)));
      Weights p;
      float maximum[2], keep[2], weight[2];
      if constexpr (kBias) {
        const int64_t bias[2] = {r.bias[0] + key, r.bias[1] + key};
        weigh_biased(g, s, c, left, bias, p, maximum);
      } else if (S::kDim < kMaxDim && n < whole) {
        weigh<false>(g, s, c, left, p, maximum);
      } else {
        weigh<true>(g, s, c, left, p, maximum);
      }
      int32_t sums[4] = {};  // of weights: columns of ones give every lane those of its rows
      prim::mma_m16n8k32(sums, p[0], 0x01010101u, 0x01010101u);
      prim::mma_m16n8k32(sums, p[1], 0x01010101u, 0x01010101u);
      EFFVIT_UNROLL
      for (int i = 0; i < 2; ++i) {
        merge_maximum(top[i], maximum[i], keep[i], weight[i]);
        total[i] = fmaf(total[i], keep[i], weight[i] * static_cast<float>(sums[2 * i]));
      }
      add_values<S>(out, p, k.from(S::kTileBytes), stage_scales(n), channels, keep, weight);
    }
    prim::cp_async_wait<0>();

    const bool merged = g.splits == 1;
    EFFVIT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t row = u.first() + acc_row() + 8 * i;
      if (row >= g.rows) continue;
      const RowPlace at = place_of(g, u.group, row);
      const int64_t pairs = g.p.B * g.p.G, slot = (u.split * pairs + u.pair(g)) * g.rows + row;
      const float part = row_part.load(acc_row() + 8 * i), factor = merged ? inverse_of(total[i]) : 1.f;
      const int64_t to = merged ? ((u.b * g.p.L + at.l) * g.p.H + at.head) * g.p.V : slot * g.p.V;
      EFFVIT_UNROLL
      for (int c = 0; c < S::kChunks; ++c) {
        const int channel = 16 * c + prim::lane_id() % 4 * 4;
        if (channel < channels) {
          float y[4];
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) y[e] = out[c][i][e] * factor;
          store_four(merged ? g.p.out : g.partial_out, merged ? g.p.dtype : DType::kFloat32, to + channel,
                     channels - channel, g.out_vec, y);
        }
      }
      if (prim::lane_id() % 4 != 0) continue;
      if (merged) {
        prim::store_global(g.p.lse + (u.b * g.p.H + at.head) * g.p.L + at.l, log_sum(top[i], total[i]) + part);
      } else {
        const int64_t kind = g.splits * pairs * g.rows;
        prim::store_global(g.partial_stats + slot, top[i]);
        prim::store_global(g.partial_stats + kind + slot, total[i]);
        prim::store_global(g.partial_stats + 2 * kind + slot, part);
      }
    }
  }
}

// Merges what the CTAs of a split left behind, in their order: a thread for every channel of a row.
template <class I>
EFFVIT_KERNEL(kThreads, 8)
int8_attention_merge_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const I count = g.p.B * g.p.G * g.rows, elements = count * g.p.V;
  EFFVIT_NO_UNROLL
  for (I i = prim::cta_id() * kThreads + prim::thread_id(); i < elements; i += prim::cta_count() * kThreads) {
    const I slot = i / g.p.V, channel = i - slot * g.p.V, pair = slot / g.rows, row = slot - pair * g.rows;
    const I b = pair / g.p.G, group = pair - b * g.p.G, l = row / g.E, head = group * g.E + row - l * g.E;
    float out = 0.f, top = -infinity(), total = 0.f;
    EFFVIT_NO_UNROLL
    for (I n = 0; n < g.splits; ++n) {
      const I at = n * count + slot;
      float keep, weight;
      merge_maximum(top, prim::load_global(g.partial_stats + at), keep, weight);
      total = fmaf(total, keep, weight * prim::load_global(g.partial_stats + g.splits * count + at));
      out = fmaf(out, keep, weight * prim::load_global(g.partial_out + at * g.p.V + channel));
    }
    store_small(g.p.out, ((b * g.p.L + l) * g.p.H + head) * g.p.V + channel, g.p.dtype, out * inverse_of(total));
    if (channel == 0) {
      const float part = prim::load_global(g.partial_stats + 2 * g.splits * count + slot);
      prim::store_global(g.p.lse + (b * g.p.H + head) * g.p.L + l, log_sum(top, total) + part);
    }
  }
}

}  // namespace int8_attention_impl
}  // namespace cuda
}  // namespace effvit
