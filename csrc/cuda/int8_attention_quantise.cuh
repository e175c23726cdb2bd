// The keys' mean, and keys and values as integers: what runs before attention. See int8_attention.cuh.
#pragma once
#include "int8_attention_common.cuh"

namespace effvit {
namespace cuda {
namespace int8_attention_impl {

// A thread adds up one column of a block of keys, key by key, as the definition says.
template <class T>
EFFVIT_KERNEL(kThreads, 8)
int8_attention_sums_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const int64_t columns = g.p.G * g.p.K, chunks = ceil_div(columns, kThreads), units = g.p.B * g.p.N * chunks;
  EFFVIT_NO_UNROLL
  for (int64_t unit = prim::cta_id(); unit < units; unit += prim::cta_count()) {
    int64_t i = unit;
    const int64_t column = take_index(i, chunks) * kThreads + prim::thread_id();
    if (column >= columns) continue;
    const int64_t block = i, first = take_index(i, g.p.N) * kTile, head = column / g.p.K;
    const int count = static_cast<int>(least(kTile, g.p.M - first));
    const T* const k = static_cast<const T*>(g.p.k) + i * g.p.k_stride_b + first * g.p.k_stride_m +
                       head * g.p.k_stride_h + (column - head * g.p.K);
    float sum = 0.f;
    EFFVIT_NO_UNROLL
    for (int key = 0; key < count; key += 16) {
      EFFVIT_UNROLL
      for (int j = 0; j < 16; ++j) {
        if (key + j < count) sum += prim::to_float(prim::load_global(k + (key + j) * g.p.k_stride_m));
      }
    }
    prim::store_global(g.sums + block * columns + column, sum);
  }
}

// The sums of the blocks, one by one, over M.
template <class I>
EFFVIT_KERNEL(kThreads, 8)
int8_attention_means_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const I columns = g.p.G * g.p.K, count = g.p.B * columns;
  EFFVIT_NO_UNROLL
  for (I i = prim::cta_id() * kThreads + prim::thread_id(); i < count; i += prim::cta_count() * kThreads) {
    const I b = i / columns;
    const float* const sums = g.sums + b * columns * g.p.N + (i - b * columns);
    float total = 0.f;
    EFFVIT_NO_UNROLL
    for (I n = 0; n < g.p.N; ++n) total += prim::load_global(sums + n * columns);
    prim::store_global(g.own_mean + i, total / static_cast<float>(g.p.M));
  }
}

// Sixteen lanes share a row, and have of it four neighbours of every 64 columns.
constexpr int kRowLanes = 16, kRowsAtOnce = kThreads / kRowLanes;

// A block of rows of a pair (b, g): numbers that exist, and zeros.
template <class T>
struct FloatRows {
  const T* base;
  int64_t stride;
  int rows, cols;
  bool vec;  // rows are multiples of four elements
  EFFVIT_DEVICE void four(int row, int col, float (&x)[4]) const {
    const int n = row < rows ? cols - col : 0;
    load_four(base + row * stride + col, n, vec && n >= 4, x);
  }
};

// Keys less their mean: of numbers beyond the rows that exist 0 remains 0.
template <class T>
struct Centred {
  FloatRows<T> x;
  const float* mean;  // or null
  bool mean_vec;
  EFFVIT_DEVICE void four(int row, int col, float (&y)[4]) const {
    x.four(row, col, y);
    if (mean == nullptr || row >= x.rows) return;
    float m[4];
    load_four(mean + col, x.cols - col, mean_vec && x.cols - col >= 4, m);
    EFFVIT_UNROLL
    for (int e = 0; e < 4; ++e) y[e] -= m[e];
  }
};

// A CTA does one block of keys of one head, and its values. Numbers are read twice, the second time from the caches.
template <class T>
EFFVIT_KERNEL(kThreads, 4)
int8_attention_quantise_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const Shared<int32_t> maxima(0, kWarps + kRowsAtOnce * kMaxDim);  // of warps; of rows' groups, by channel
  const int lane = prim::thread_id() % kRowLanes, group = prim::thread_id() / kRowLanes;
  const int64_t units = g.p.B * g.p.G * g.p.N;
  EFFVIT_NO_UNROLL
  for (int64_t unit = prim::cta_id(); unit < units; unit += prim::cta_count()) {
    int64_t pair = unit;
    const int64_t n = take_index(pair, g.p.N), first = n * kTile;
    const int64_t b = pair / g.p.G, head = pair - b * g.p.G, scales = (b * g.p.N + n) * g.p.G + head;
    const int rows = static_cast<int>(least(kTile, g.p.M - first));

    const T* const k =
        static_cast<const T*>(g.p.k) + b * g.p.k_stride_b + first * g.p.k_stride_m + head * g.p.k_stride_h;
    const Centred<T> keys = {{k, g.p.k_stride_m, rows, static_cast<int>(g.p.K), g.k_vec},
                             g.mean == nullptr ? nullptr : g.mean + pair * g.p.K,
                             g.mean_vec};
    int32_t largest = 0;
    EFFVIT_NO_UNROLL
    for (int col = 4 * lane; col < g.p.K; col += 4 * kRowLanes) {
      EFFVIT_UNROLL
      for (int i = 0; i < kTile; i += kRowsAtOnce) {
        float x[4];
        keys.four(i + group, col, x);
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) largest = larger(largest, magnitude_bits(x[e]));
      }
    }
    largest = largest_of<prim::kWarpSize>(largest);
    prim::sync_threads();  // the previous block's readers
    if (prim::lane_id() == 0) maxima.store(prim::warp_id(), largest);

    const T* const v =
        static_cast<const T*>(g.p.v) + b * g.p.v_stride_b + first * g.p.v_stride_m + head * g.p.v_stride_h;
    const FloatRows<T> values = {v, g.p.v_stride_m, rows, static_cast<int>(g.p.V), g.v_vec};
    EFFVIT_NO_UNROLL
    for (int col = 4 * lane; col < g.p.V; col += 4 * kRowLanes) {
      Vec<int32_t, 4> top = {};
      EFFVIT_UNROLL
      for (int i = 0; i < kTile; i += kRowsAtOnce) {
        float x[4];
        values.four(i + group, col, x);
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) top.v[e] = larger(top.v[e], magnitude_bits(x[e]));
      }
      maxima.store_vec(kWarps + group * kMaxDim + col, top);
    }
    prim::sync_threads();

    EFFVIT_UNROLL
    for (int w = 0; w < kWarps; ++w) largest = larger(largest, maxima.load(w));
    const Quantiser to_steps(largest);
    int8_t* const k8 = g.k8 + (pair * g.p.N + n) * kTile * g.k.cols;
    EFFVIT_NO_UNROLL
    for (int col = 4 * lane; col < g.k.cols; col += 4 * kRowLanes) {
      EFFVIT_UNROLL
      for (int i = 0; i < kTile; i += kRowsAtOnce) {
        float x[4];
        keys.four(i + group, col, x);
        prim::store_global_vec(k8 + (i + group) * g.k.cols + col, to_steps.four(x));
      }
    }
    if (prim::thread_id() == 0) prim::store_global(g.own_k_scale + scales, to_steps.step);

    int8_t* const v8 = g.v8 + (pair * g.p.N + n) * kTile * g.v.cols;
    EFFVIT_NO_UNROLL
    for (int col = 4 * lane; col < g.v.cols; col += 4 * kRowLanes) {
      Vec<int32_t, 4> top = {};
      if (col < g.p.V) {
        EFFVIT_UNROLL
        for (int i = 0; i < kRowsAtOnce; ++i) {
          const auto other = maxima.load_vec<Vec<int32_t, 4>>(kWarps + i * kMaxDim + col);
          EFFVIT_UNROLL
          for (int e = 0; e < 4; ++e) top.v[e] = larger(top.v[e], other.v[e]);
        }
      }
      const Quantiser channel[4] = {Quantiser(top.v[0]), Quantiser(top.v[1]), Quantiser(top.v[2]), Quantiser(top.v[3])};
      EFFVIT_UNROLL
      for (int i = 0; i < kTile; i += kRowsAtOnce) {
        float x[4];
        values.four(i + group, col, x);
        uint32_t steps[4];
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) steps[e] = static_cast<uint32_t>(channel[e](x[e]));
        prim::store_global_vec(v8 + (i + group) * g.v.cols + col, pack_bytes(steps[0], steps[1], steps[2], steps[3]));
      }
      if (group == 0 && col < g.v_scale_cols) {
        const Vec<float, 4> step = {{channel[0].step, channel[1].step, channel[2].step, channel[3].step}};
        prim::store_global_vec(g.own_v_scale + scales * g.v_scale_cols + col, step);
      }
    }
  }
}

}  // namespace int8_attention_impl
}  // namespace cuda
}  // namespace effvit
