// Products of int8 with dense weights, tile by tile, for ops with any epilogue: device code and the choice of tiles.
//
// A CTA computes tiles of x Wᵀ. Rows of both operands have the depth last, as the tensor cores want it. They are copied
// kStages - 1 steps ahead, with one barrier a step; the exact sums then take the epilogue's way to memory.
#pragma once
#include "int8_tiles.cuh"

namespace effvit {
namespace cuda {
namespace int8_impl {

// A tile of kM rows of x and kN of the weight, kDepth bytes deep, computed by kWarpsM x kWarpsN warps.
template <int kM_, int kN_, int kDepth_, int kWarpsM_, int kWarpsN_, int kMinCtas_>
struct Shape {
  static constexpr int kM = kM_, kN = kN_, kDepth = kDepth_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = kWarpsM * kWarpsN * prim::kWarpSize, kMinCtas = kMinCtas_, kStages = 4;
  static constexpr int kTilesM = kM / kWarpsM / 16, kTilesN = kN / kWarpsN / 8;  // of a warp: 16 rows, 8 columns
  static constexpr int kStride = row_stride<int8_t>(kDepth);
  static constexpr int kStageBytes = (kM + kN) * kStride, kSumBytes = kM * sum_stride(kN) * 4;
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;  // the sums lie over the operands
  static_assert(conflict_free<int8_t>(kDepth), "row stride must be an odd multiple of 16 bytes");
  static_assert(kM % (16 * kWarpsM) == 0 && kN % (16 * kWarpsN) == 0, "B is loaded for two tiles at a time");
  static_assert(kDepth % 32 == 0, "a product is 32 deep");
};
using Large = Shape<128, 128, 64, 2, 4, 2>;
using Medium = Shape<64, 64, 64, 2, 2, 4>;
using Small = Shape<16, 64, 128, 1, 4, 4>;

template <class S>
EFFVIT_DEVICE int warp_row() {
  return prim::warp_id() / S::kWarpsN * (S::kTilesM * 16);
}
template <class S>
EFFVIT_DEVICE int warp_col() {
  return prim::warp_id() % S::kWarpsN * (S::kTilesN * 8);
}

// acc += x Wᵀ for this warp's part of a tile. ldmatrix counts in 16-bit elements: a step of 8 is 16 bytes.
template <class S>
EFFVIT_DEVICE void multiply(int32_t (&acc)[S::kTilesM][S::kTilesN][4], const Shared<int8_t>& x,
                            const Shared<int8_t>& weight) {
  const Ldmatrix at;
  const int x_at = (warp_row<S>() + at.low + at.half) * S::kStride + 2 * at.quarter;
  const int weight_at = (warp_col<S>() + at.low + at.quarter) * S::kStride + 2 * at.half;
  EFFVIT_UNROLL
  for (int k = 0; k < S::kDepth; k += 32) {
    uint32_t a[S::kTilesM][4];
    EFFVIT_UNROLL
    for (int m = 0; m < S::kTilesM; ++m) prim::ldmatrix_x4<false>(a[m], x, x_at + m * 16 * S::kStride + k);
    EFFVIT_UNROLL
    for (int n = 0; n < S::kTilesN; n += 2) {
      uint32_t b[4];
      prim::ldmatrix_x4<false>(b, weight, weight_at + n * 8 * S::kStride + k);
      EFFVIT_UNROLL
      for (int m = 0; m < S::kTilesM; ++m) {
        prim::mma_m16n8k32(acc[m][n], a[m], b[0], b[1]);
        prim::mma_m16n8k32(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <class S>
EFFVIT_DEVICE void stage(const Shared<int32_t>& to, const int32_t (&acc)[S::kTilesM][S::kTilesN][4]) {
  const int row = warp_row<S>() + prim::lane_id() / 4, col = warp_col<S>() + acc_col();
  EFFVIT_UNROLL
  for (int m = 0; m < S::kTilesM; ++m) {
    EFFVIT_UNROLL
    for (int n = 0; n < S::kTilesN; ++n) {
      EFFVIT_UNROLL
      for (int half = 0; half < 2; ++half)
        to.store_vec((row + m * 16 + half * 8) * sum_stride(S::kN) + col + n * 8,
                     Vec<int32_t, 2>{{acc[m][n][2 * half], acc[m][n][2 * half + 1]}});
    }
  }
}

// Tiles of the result that are this CTA's, each handed to finish(sums, place). `Plan` is that of an op: p, x, weight,
// column_tiles and units are read.
template <class S, class Plan, class Finish>
EFFVIT_DEVICE void compute_tiles(const Plan& g, const Finish& finish) {
  const Shared<int8_t> operands(0, S::kStages * S::kStageBytes);
  const Shared<int32_t> sums(0, S::kM * sum_stride(S::kN));
  const int steps = static_cast<int>(ceil_div(g.p.K, S::kDepth));
  EFFVIT_NO_UNROLL
  for (int64_t unit = prim::cta_id(); unit < g.units; unit += prim::cta_count()) {
    int64_t i = unit;
    const int64_t col = take_index(i, g.column_tiles) * S::kN, row = i * S::kM;
    const auto load = [&](int step) {
      if (step < steps) {
        const Shared<int8_t> to = operands.from(step % S::kStages * S::kStageBytes);
        const int k = step * S::kDepth;
        load_tile<S::kM, S::kDepth, S::kStride, S::kThreads>(to, g.x, row, k);
        load_tile<S::kN, S::kDepth, S::kStride, S::kThreads>(to.from(S::kM * S::kStride), g.weight, col, k);
      }
      prim::cp_async_commit();  // an empty group beyond the last step: so the waits below count alike
    };
    int32_t acc[S::kTilesM][S::kTilesN][4] = {};
    prim::sync_threads();  // the previous tile's readers
    EFFVIT_NO_UNROLL
    for (int step = 0; step < S::kStages - 1; ++step) load(step);
    EFFVIT_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      prim::cp_async_wait<S::kStages - 2>();
      prim::sync_threads();  // this step's operands, and the last step's readers, over which it copies
      load(step + S::kStages - 1);
      const Shared<int8_t> from = operands.from(step % S::kStages * S::kStageBytes);
      multiply<S>(acc, from, from.from(S::kM * S::kStride));
    }
    prim::cp_async_wait<0>();
    prim::sync_threads();  // the readers of the operands, over which the sums are staged
    stage<S>(sums, acc);
    prim::sync_threads();
    const Place at = {row, col, static_cast<int>(least(S::kM, g.p.M - row)),
                      static_cast<int>(least(S::kN, g.p.N - col))};
    finish(StagedSums<S::kN>{sums}, at);
  }
}

// ---- launch ----

inline void register_operands(prim::GlobalRanges& ranges, const int8_t* x, int64_t x_stride, const int8_t* weight,
                              int64_t weight_stride, int64_t M, int64_t N, int64_t K) {
  ranges.read(x, extent_bytes(DType::kInt8, {{M, x_stride}, {K, 1}}));
  ranges.read(weight, extent_bytes(DType::kInt8, {{N, weight_stride}, {K, 1}}));
}

// Calls f with a value of the shape of tiles.
template <class F>
cudaError_t dispatch_shape(int64_t M, int64_t N, const F& f) {
  const int rows = tile_rows(M, N);
  return rows == Large::kM ? f(Large{}) : rows == Medium::kM ? f(Medium{}) : f(Small{});
}

}  // namespace int8_impl
}  // namespace cuda
}  // namespace effvit
