// What the kernels of int8_attention share: the plan, places in the workspace, integers. See int8_attention.cuh.
#pragma once
#include "../common/int8_attention_params.h"
#include "int8_tiles.cuh"

namespace effvit {
namespace cuda {
namespace int8_attention_impl {

using namespace int8_impl;

constexpr int kMaxDim = 256;  // of keys and of values
constexpr float kSteps = 127.f;
constexpr float kLn2 = 0.6931471805599453f;
static_assert(kAttentionBlock == kTile, "a tile of keys is a block");

EFFVIT_DEVICE float infinity() { return prim::bit_cast<float>(0x7f800000u); }

// Integers of keys or values: rows of one head at base + b * stride_b + g * stride_h.
struct Integers8 {
  const int8_t* base;
  int64_t stride_b, stride_m, stride_h;
  int32_t cols;
  bool vec;  // every row starts at a multiple of 16 bytes
};

struct Plan {
  Int8AttentionParams p;
  Integers8 k, v;
  const float *k_scale, *v_scale, *mean;  // [B, N, G], [B, N, G, v_scale_cols], [B, G, K] or null
  int32_t v_scale_cols;
  bool v_scale_vec;  // its rows start at a multiple of 16 bytes
  bool q_vec, k_vec, v_vec, mean_vec, out_vec;  // rows of these start at a multiple of four elements
  // A row is a query of one of the E heads that share keys: row l * E + e of a pair (b, g).
  int64_t E, rows, row_blocks;
  int64_t walk, splits;  // blocks of keys of a CTA
  int64_t units;  // of attention: row blocks, splits, pairs
  // The workspace.
  float* sums;  // [B, N, G, K]: of a block's keys
  float* own_mean;  // [B, G, K]
  int8_t *k8, *v8;  // [B, G, N * 64, K rounded up to 16], likewise V
  float *own_k_scale, *own_v_scale;  // [B, N, G], [B, N, G, V rounded up to 4]
  float* partial_out;  // [splits, B, G, rows, V]
  float* partial_stats;  // [3, splits, B, G, rows]: maximum, sum of weights, the scores' part of the keys' mean
  uint64_t workspace_bytes;
};

// ---- integers ----

// |x| as bits: ordered like the numbers, a NaN above them all.
EFFVIT_DEVICE int32_t magnitude_bits(float x) { return prim::bit_cast<int32_t>(x) & 0x7fffffff; }

EFFVIT_DEVICE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// The lowest bytes of four words.
EFFVIT_DEVICE uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return prim::permute_bytes(prim::permute_bytes(a, b, 0x0040), prim::permute_bytes(c, d, 0x0040), 0x5410);
}

// Numbers in steps of a 127th of the largest, whose bits are given.
struct Quantiser {
  float inverse, step;
  EFFVIT_DEVICE explicit Quantiser(int32_t largest) {
    const float x = prim::bit_cast<float>(largest);
    inverse = x >= kAttentionSmallest ? kSteps / x : 0.f;
    step = x / kSteps;
  }
  // Infinity times 0 is no number, and becomes 0.
  EFFVIT_DEVICE int32_t operator()(float x) const { return prim::round_to_int(x * inverse); }
  EFFVIT_DEVICE uint32_t four(const float (&x)[4]) const {
    uint32_t steps[4];
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) steps[e] = static_cast<uint32_t>((*this)(x[e]));
    return pack_bytes(steps[0], steps[1], steps[2], steps[3]);
  }
};

template <int kLanes>
EFFVIT_DEVICE int32_t largest_of(int32_t x) {
  EFFVIT_UNROLL
  for (int m = kLanes / 2; m > 0; m /= 2) x = larger(x, prim::shuffle_xor(x, m));
  return x;
}

// Writes the first n of four neighbouring elements. vec: all four can be written at once.
template <class T>
EFFVIT_DEVICE void store_four(T* to, int n, bool vec, const float (&y)[4]) {
  Vec<T, 4> x;
  EFFVIT_UNROLL
  for (int e = 0; e < 4; ++e) x.v[e] = prim::from_float<T>(y[e]);
  if (vec && n >= 4) {
    prim::store_global_vec(to, x);
  } else {
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (e < n) prim::store_global(to + e, x.v[e]);
    }
  }
}
EFFVIT_DEVICE void store_four(void* to, DType type, int64_t at, int n, bool vec, const float (&y)[4]) {
  if (type == DType::kFloat32) {
    store_four(static_cast<float*>(to) + at, n, vec, y);
  } else if (type == DType::kBFloat16) {
    store_four(static_cast<prim::bfloat16*>(to) + at, n, vec, y);
  } else {
    store_four(static_cast<prim::float16*>(to) + at, n, vec, y);
  }
}

// ---- the result of a row ----

// The factors of what was gathered so far and of what is added, whose maximum is `maximum`. A NaN stays one: it does
// not become the maximum, but its factor is a NaN.
EFFVIT_DEVICE void merge_maximum(float& top, float maximum, float& keep, float& weight) {
  const float new_top = fmaxf(top, maximum), finite = new_top == -infinity() ? 0.f : new_top;
  keep = prim::exp2(top - finite);
  weight = prim::exp2(maximum - finite);
  top = new_top;
}

EFFVIT_DEVICE float inverse_of(float total) { return total == 0.f ? 0.f : 1.f / total; }
EFFVIT_DEVICE float log_sum(float top, float total) { return top * kLn2 + prim::log(total / kSteps); }

}  // namespace int8_attention_impl
}  // namespace cuda
}  // namespace effvit
