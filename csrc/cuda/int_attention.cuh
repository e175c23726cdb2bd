// int_attention: device code and launch, on prim only.
//
// A CTA of four warps has 64 queries of a head and 64 channels of its values, and goes over the keys three times, 64 at
// once: for the largest score of each row, for the sum of the exponentials, for the product of the probabilities with
// the values. Scores are computed again each time, on the tensor cores: that costs less than to keep them, and no row
// is too long. Keys are copied one step ahead.
//
// Probabilities are left in registers. A lane has, of row g and of row g + 8, the columns 2t and 2t + 1 of every 8
// keys, where the next product wants its operand at positions 4t.. and 16 + 4t.. of 32. So values are transposed with
// their keys in that order: position 16 i + 4t + j is key 16 i + 8 (j / 2) + 2t + j % 2.
//
// Operands are int8, so a probability of b - 1 bits is kDigits digits of seven bits. Over 64 keys its product with the
// values is below 2^6 2^15 2^7 and built up in int32 from the highest digit down; over all keys it is in int64 where
// the sum of exponentials may saturate and probabilities with it, else a row of them is below 2^15.
#pragma once
#include "int8_tiles.cuh"
#include "int_math.cuh"

namespace effvit {
namespace cuda {
namespace int_attention_impl {

using namespace int_impl;
using int8_impl::load_tile;
using int8_impl::Matrix;

constexpr int kRows = 64, kKeys = 64, kDepth = 64, kValues = 64, kThreads = 128;
constexpr int kStride = row_stride<int8_t>(64), kTileBytes = 64 * kStride;
constexpr int kSharedBytes = 5 * kTileBytes;  // queries and keys of two steps, values
static_assert(conflict_free<int8_t>(64), "row stride must be an odd multiple of 16 bytes");
constexpr int kScoreTiles = kKeys / 8, kValueTiles = kValues / 8;

struct Plan {
  IntAttentionParams p;
  bool q_vec, k_vec, v_vec;  // rows start at multiples of 16 bytes; of v at multiples of 4, and have so many
  int64_t row_tiles, value_tiles, key_tiles, depth_chunks, units;
};

// The values of 64 keys and channels, transposed, keys in the order of the probabilities; zeros beyond.
EFFVIT_DEVICE void load_values(const Shared<int8_t>& to, const int8_t* v, int64_t stride, int64_t keys,
                               int64_t channels, bool vec) {
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id(); i < 256; i += kThreads) {
    const int group = i % 16, place = i / 16, first = place / 4 * 16 + place % 4 * 2, channel = 4 * group;
    uint32_t rows[4];
    EFFVIT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int key = first + j / 2 * 8 + j % 2;
      const int8_t* const from = v + key * stride + channel;
      rows[j] = 0;
      if (key >= keys) continue;
      if (vec && channel < channels) {
        rows[j] = prim::load_global_vec<uint32_t>(from);
      } else {
        EFFVIT_UNROLL
        for (int c = 0; c < 4; ++c) {
          if (channel + c < channels)
            rows[j] |= static_cast<uint32_t>(static_cast<uint8_t>(prim::load_global(from + c))) << (8 * c);
        }
      }
    }
    EFFVIT_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int c = (k + group / 2) % 4;  // lanes take channels in turn: fewer meet in one bank
      uint32_t word = 0;
      EFFVIT_UNROLL
      for (int j = 0; j < 4; ++j) word |= (rows[j] >> (8 * c) & 255u) << (8 * j);
      to.store_vec((channel + c) * kStride + place * 4, word);
    }
  }
}

// acc += q kᵀ over a chunk of the depth, for this warp's rows.
EFFVIT_DEVICE void multiply(int32_t (&acc)[kScoreTiles][4], const Shared<int8_t>& q, const Shared<int8_t>& k) {
  const Ldmatrix at;
  const int q_at = (warp_row() + at.low + at.half) * kStride + 2 * at.quarter;
  const int k_at = (at.low + at.quarter) * kStride + 2 * at.half;
  EFFVIT_UNROLL
  for (int d = 0; d < kDepth; d += 32) {
    uint32_t a[4];
    prim::ldmatrix_x4<false>(a, q, q_at + d);
    EFFVIT_UNROLL
    for (int n = 0; n < kScoreTiles; n += 2) {
      uint32_t b[4];
      prim::ldmatrix_x4<false>(b, k, k_at + n * 8 * kStride + d);
      prim::mma_m16n8k32(acc[n], a, b[0], b[1]);
      prim::mma_m16n8k32(acc[n + 1], a, b[2], b[3]);
    }
  }
}

// total += P v of 64 keys.
template <int kDigits, class Total>
EFFVIT_DEVICE void multiply_values(Total (&total)[kValueTiles][4], const int32_t (&prob)[kScoreTiles][4],
                                   const Shared<int8_t>& v) {
  uint32_t a[kDigits][2][4];
  EFFVIT_UNROLL
  for (int digit = 0; digit < kDigits; ++digit) {
    EFFVIT_UNROLL
    for (int s = 0; s < 2; ++s) {
      EFFVIT_UNROLL
      for (int i = 0; i < 4; ++i) {
        a[digit][s][i] = 0;
        EFFVIT_UNROLL
        for (int j = 0; j < 4; ++j) {
          const uint32_t x = static_cast<uint32_t>(prob[4 * s + i / 2 * 2 + j / 2][i % 2 * 2 + j % 2]);
          a[digit][s][i] |= (x >> (7 * digit) & 127u) << (8 * j);
        }
      }
    }
  }
  const Ldmatrix at;
  const int v_at = (at.low + at.quarter) * kStride + 2 * at.half;
  EFFVIT_UNROLL
  for (int n = 0; n < kValueTiles; n += 2) {
    uint32_t b[2][4];
    EFFVIT_UNROLL
    for (int s = 0; s < 2; ++s) prim::ldmatrix_x4<false>(b[s], v, v_at + n * 8 * kStride + 32 * s);
    int32_t sum[2][4] = {};
    EFFVIT_UNROLL
    for (int digit = kDigits - 1; digit >= 0; --digit) {
      EFFVIT_UNROLL
      for (int s = 0; s < 2; ++s) {
        prim::mma_m16n8k32(sum[0], a[digit][s], b[s][0], b[s][1]);
        prim::mma_m16n8k32(sum[1], a[digit][s], b[s][2], b[s][3]);
      }
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (digit > 0) sum[0][e] *= 128, sum[1][e] *= 128;
      }
    }
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) total[n][e] += sum[0][e], total[n + 1][e] += sum[1][e];
  }
}

// Of the four lanes that share a row.
EFFVIT_DEVICE int32_t row_max(int32_t x) {
  EFFVIT_UNROLL
  for (int m = 2; m > 0; m /= 2) x = most<int32_t>(x, prim::shuffle_xor(x, m));
  return x;
}
// Saturates at 2^31 - 1; x is below 2^31.
EFFVIT_DEVICE uint32_t row_sum(uint32_t x) {
  EFFVIT_UNROLL
  for (int m = 2; m > 0; m /= 2) {
    x += prim::shuffle_xor(x, m);
    x = x > 0x7fffffffu ? 0x7fffffffu : x;
  }
  return x;
}

template <int kDigits, class Total>
EFFVIT_KERNEL(kThreads, 2)
int_attention_fwd_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const IntAttentionParams& p = g.p;
  const Shared<int8_t> queries(0, 2 * kTileBytes), keys(2 * kTileBytes, 2 * kTileBytes),
      values(4 * kTileBytes, kTileBytes);
  const int64_t steps = 3 * g.key_tiles * g.depth_chunks;
  EFFVIT_NO_UNROLL
  for (int64_t unit = prim::cta_id(); unit < g.units; unit += prim::cta_count()) {
    int64_t i = unit;
    const int64_t channel = take_index(i, g.value_tiles) * kValues, row = take_index(i, g.row_tiles) * kRows;
    const int64_t h = take_index(i, p.H), b = i;
    const Matrix q = {p.q + b * p.q_stride_b + h * p.q_stride_h, p.L, p.q_stride_l, static_cast<int32_t>(p.K), g.q_vec};
    const Matrix k = {p.k + b * p.k_stride_b + h * p.k_stride_h, p.M, p.k_stride_l, static_cast<int32_t>(p.K), g.k_vec};
    const int8_t* const v = p.v + b * p.v_stride_b + h * p.v_stride_h + channel;
    const int32_t* const bias = p.bias ? p.bias + b % p.W * p.bias_stride_w + h * p.bias_stride_h : nullptr;
    const auto load = [&](int64_t step) {
      if (step < steps) {
        const int at = static_cast<int>(step % 2) * kTileBytes;
        const int depth = static_cast<int>(step % g.depth_chunks) * kDepth;
        if (g.depth_chunks > 1 || step == 0)
          load_tile<kRows, kDepth, kStride, kThreads>(queries.from(g.depth_chunks > 1 ? at : 0), q, row, depth);
        load_tile<kKeys, kDepth, kStride, kThreads>(keys.from(at), k, step / g.depth_chunks % g.key_tiles * kKeys,
                                                    depth);
      }
      prim::cp_async_commit();
    };
    int32_t top[2] = {INT32_MIN, INT32_MIN}, low[2] = {}, f[2] = {};
    uint32_t sum[2] = {};
    int32_t x[kScoreTiles][4];
    Total total[kValueTiles][4] = {};
    load(0);  // over what the previous unit read before its last barrier
    int64_t step = 0;
    EFFVIT_NO_UNROLL
    for (int pass = 0; pass < 3; ++pass) {
      EFFVIT_NO_UNROLL
      for (int64_t key = 0; key < p.M; key += kKeys) {
        EFFVIT_UNROLL
        for (int n = 0; n < kScoreTiles; ++n) {
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) x[n][e] = 0;
        }
        EFFVIT_NO_UNROLL
        for (int64_t chunk = 0; chunk < g.depth_chunks; ++chunk, ++step) {
          prim::cp_async_wait<0>();
          prim::sync_threads();  // this step's operands; readers of what is copied over
          load(step + 1);
          const int at = static_cast<int>(step % 2) * kTileBytes;
          multiply(x, queries.from(g.depth_chunks > 1 ? at : 0), keys.from(at));
        }
        if (pass == 2) load_values(values, v + key * p.v_stride_l, p.v_stride_l, p.M - key, p.V - channel, g.v_vec);
        EFFVIT_UNROLL
        for (int n = 0; n < kScoreTiles; ++n) {
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) {
            const int64_t r = row + acc_row() + e / 2 * 8, column = key + n * 8 + acc_col() + e % 2;
            const bool there = column < p.M;
            int32_t y = rescale(x[n][e], p.scores.multiplier, p.scores.shift, p.scores.low, p.scores.high);
            if (bias && there && r < p.L) y = saturating_sum(y, prim::load_global(bias + r * p.bias_stride_l + column));
            if (pass == 0) {
              if (there) top[e / 2] = most<int32_t>(top[e / 2], y);
              continue;
            }
            const int32_t d = most<int32_t>(y, low[e / 2]) - top[e / 2];
            const uint32_t exponential =
                there ? static_cast<uint32_t>(p.exp.wide ? shift_exp<1>(p.exp, d) : shift_exp<0>(p.exp, d)) : 0u;
            if (pass == 1) {
              sum[e / 2] += exponential;
              sum[e / 2] = sum[e / 2] > 0x7fffffffu ? 0x7fffffffu : sum[e / 2];
            } else {
              x[n][e] = static_cast<int32_t>(exponential * static_cast<uint32_t>(f[e / 2]) >> (32 - p.bits));
            }
          }
        }
        if (pass == 2) {
          prim::sync_threads();  // the values
          multiply_values<kDigits>(total, x, values);
        }
      }
      EFFVIT_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (pass == 0) {
          top[half] = row_max(top[half]);
          low[half] = lowest_of(p.exp, top[half]);
        } else if (pass == 1) {
          f[half] = static_cast<int32_t>(0x7fffffffu / row_sum(sum[half]));
        }
      }
    }
    prim::cp_async_wait<0>();
    EFFVIT_UNROLL
    for (int n = 0; n < kValueTiles; ++n) {
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int64_t r = row + acc_row() + e / 2 * 8, c = channel + n * 8 + acc_col() + e % 2;
        if (r < p.L && c < p.V)
          store_integer(p.out, ((b * p.L + r) * p.H + h) * p.V + c, p.out_dtype, finished(p.rescale, total[n][e]));
      }
    }
  }
}

// ---- plan and launch ----

inline Plan make_plan(const IntAttentionParams& p) {
  Plan g = {};
  g.p = p;
  g.q_vec = aligned16(p.q, 1, {p.q_stride_b, p.q_stride_l, p.q_stride_h});
  g.k_vec = aligned16(p.k, 1, {p.k_stride_b, p.k_stride_l, p.k_stride_h});
  g.v_vec = reinterpret_cast<uintptr_t>(p.v) % 4 == 0 && (p.v_stride_b | p.v_stride_l | p.v_stride_h | p.V) % 4 == 0;
  g.row_tiles = ceil_div(p.L, kRows), g.value_tiles = ceil_div(p.V, kValues), g.key_tiles = ceil_div(p.M, kKeys);
  g.depth_chunks = ceil_div(p.K, kDepth);
  g.units = p.B * p.H * g.row_tiles * g.value_tiles;
  return g;
}

template <class Total>
cudaError_t launch_digits(const Plan& g, cudaStream_t stream) {
  const int64_t grid = grid_size(g.units);
  if (g.p.bits <= 8)
    return EFFVIT_LAUNCH((int_attention_fwd_kernel<1, Total>), grid, kThreads, kSharedBytes, stream, g);
  if (g.p.bits <= 15)
    return EFFVIT_LAUNCH((int_attention_fwd_kernel<2, Total>), grid, kThreads, kSharedBytes, stream, g);
  return EFFVIT_LAUNCH((int_attention_fwd_kernel<3, Total>), grid, kThreads, kSharedBytes, stream, g);
}

}  // namespace int_attention_impl
}  // namespace cuda

inline cudaError_t launch_int_attention_fwd(const IntAttentionParams& p, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::int_attention_impl;
  if (p.B * p.H == 0 || p.L == 0 || p.V == 0) return cudaSuccess;
  prim::GlobalRanges ranges;
  ranges.read(p.q,
              extent_bytes(DType::kInt8, {{p.B, p.q_stride_b}, {p.L, p.q_stride_l}, {p.H, p.q_stride_h}, {p.K, 1}}));
  ranges.read(p.k,
              extent_bytes(DType::kInt8, {{p.B, p.k_stride_b}, {p.M, p.k_stride_l}, {p.H, p.k_stride_h}, {p.K, 1}}));
  ranges.read(p.v,
              extent_bytes(DType::kInt8, {{p.B, p.v_stride_b}, {p.M, p.v_stride_l}, {p.H, p.v_stride_h}, {p.V, 1}}));
  if (p.bias)
    ranges.read(p.bias,
                extent_bytes(DType::kInt32,
                             {{p.W, p.bias_stride_w}, {p.H, p.bias_stride_h}, {p.L, p.bias_stride_l}, {p.M, 1}}));
  ranges.write_once(p.out, tensor_bytes(p.out_dtype, p.B * p.L * p.H * p.V));
  const Plan g = make_plan(p);
  const cudaError_t error = p.may_saturate() ? launch_digits<int64_t>(g, stream) : launch_digits<int32_t>(g, stream);
  ranges.finish();
  return error;
}

}  // namespace effvit
