// sparse24_int8_linear: device code and launch, on prim only.
//
// The sparse operand of the tensor cores is the first one, so a CTA computes tiles of W xᵀ: channels are rows, tokens
// are columns, and the exact sums are transposed on their way through shared memory. Kept values and metadata are read
// as they are in the canonical form; a lane's metadata are four bytes of a row.
#pragma once
#include "../common/sparse24_int8_linear_params.h"
#include "int8_tiles.cuh"

namespace effvit {
namespace cuda {
namespace sparse24_int8_linear_impl {

using namespace int8_impl;

// A tile of kChannels rows of the weight and kTokens of x, computed by kWarpsC x kWarpsT warps. It is 128 deep: then
// the metadata of a row are one piece of 16 bytes.
template <int kChannels_, int kTokens_, int kWarpsC_, int kWarpsT_, int kStages_, int kMinCtas_>
struct Shape {
  static constexpr int kChannels = kChannels_, kTokens = kTokens_, kWarpsC = kWarpsC_, kWarpsT = kWarpsT_;
  static constexpr int kThreads = kWarpsC * kWarpsT * prim::kWarpSize, kStages = kStages_, kMinCtas = kMinCtas_;
  static constexpr int kDepth = 128, kMetaBytes = kDepth / 8;
  static constexpr int kXStride = row_stride<int8_t>(kDepth), kValuesStride = row_stride<int8_t>(kDepth / 2);
  static constexpr int kTilesC = kChannels / kWarpsC / 16, kTilesT = kTokens / kWarpsT / 8;  // of a warp
  static constexpr int kValuesAt = kTokens * kXStride, kMetaAt = kValuesAt + kChannels * kValuesStride;
  static constexpr int kStageBytes = kMetaAt + kChannels * kMetaBytes;
  static constexpr int kSumBytes = kTokens * sum_stride(kChannels) * 4;
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;  // the sums lie over the operands
  static_assert(kChannels % (16 * kWarpsC) == 0 && kTokens % (8 * kWarpsT) == 0, "warps have whole tiles");
  static_assert(conflict_free<int8_t>(kDepth) && conflict_free<int8_t>(kDepth / 2),
                "row stride must be an odd multiple of 16 bytes");
  static_assert(kMetaBytes == kVec<int8_t>, "the metadata of a row are one piece");
};
using Large = Shape<128, 128, 2, 4, 3, 2>;
using Medium = Shape<64, 64, 2, 2, 3, 4>;
using Small = Shape<64, 16, 4, 1, 4, 4>;

struct Plan {
  Sparse24Int8LinearParams p;
  Matrix x, values, meta;
  EpilogueAccess access;
  int64_t channel_tiles, units;  // units: tiles of the result; CTA i computes i, i + ctas, ...
};

constexpr uint8_t kUnused = 0xee;  // metadata where there are none: zeros would be undefined

template <class S>
EFFVIT_DEVICE int warp_channel() {
  return prim::warp_id() / S::kWarpsT * (S::kTilesC * 16);
}
template <class S>
EFFVIT_DEVICE int warp_token() {
  return prim::warp_id() % S::kWarpsT * (S::kTilesT * 8);
}

// acc += W xᵀ for this warp's part of a tile.
template <class S>
EFFVIT_DEVICE void multiply(int32_t (&acc)[S::kTilesC][S::kTilesT][4], const Shared<int8_t>& stage) {
  const Shared<int8_t> values = stage.from(S::kValuesAt), meta = stage.from(S::kMetaAt);
  const Ldmatrix at;
  const int lane = prim::lane_id(), channel = warp_channel<S>();
  const int x_at = (warp_token<S>() + lane % 8) * S::kXStride + lane / 8 * 16;
  const int values_at = (channel + at.low + at.half) * S::kValuesStride + 2 * at.quarter;
  const int meta_at = (channel + lane / 4 + lane % 2 * 8) * S::kMetaBytes + lane % 4 / 2 * 4;
  EFFVIT_UNROLL
  for (int k = 0; k < S::kDepth; k += 64) {
    uint32_t b[S::kTilesT][4];
    EFFVIT_UNROLL
    for (int t = 0; t < S::kTilesT; ++t) prim::ldmatrix_x4<false>(b[t], stage, x_at + t * 8 * S::kXStride + k);
    EFFVIT_UNROLL
    for (int c = 0; c < S::kTilesC; ++c) {
      uint32_t a[4];
      prim::ldmatrix_x4<false>(a, values, values_at + c * 16 * S::kValuesStride + k / 2);
      const auto kept = meta.template load_vec<uint32_t>(meta_at + c * 16 * S::kMetaBytes + k / 8);
      EFFVIT_UNROLL
      for (int t = 0; t < S::kTilesT; ++t) prim::mma_sp_m16n8k64(acc[c][t], a, b[t], kept);
    }
  }
}

template <class S>
EFFVIT_DEVICE void stage_sums(const Shared<int32_t>& to, const int32_t (&acc)[S::kTilesC][S::kTilesT][4]) {
  const int channel = warp_channel<S>() + prim::lane_id() / 4, token = warp_token<S>() + acc_col();
  EFFVIT_UNROLL
  for (int c = 0; c < S::kTilesC; ++c) {
    EFFVIT_UNROLL
    for (int t = 0; t < S::kTilesT; ++t) {
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e)
        to.store((token + t * 8 + e % 2) * sum_stride(S::kChannels) + channel + c * 16 + e / 2 * 8, acc[c][t][e]);
    }
  }
}

template <class S, class Out>
EFFVIT_KERNEL(S::kThreads, S::kMinCtas)
sparse24_int8_linear_fwd_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  const Shared<int8_t> operands(0, S::kStages * S::kStageBytes);
  const Shared<int32_t> sums(0, S::kTokens * sum_stride(S::kChannels));
  const int steps = static_cast<int>(ceil_div(g.p.K, S::kDepth));
  EFFVIT_NO_UNROLL
  for (int64_t unit = prim::cta_id(); unit < g.units; unit += prim::cta_count()) {
    int64_t i = unit;
    const int64_t channel = take_index(i, g.channel_tiles) * S::kChannels, token = i * S::kTokens;
    const auto load = [&](int step) {
      if (step < steps) {
        const Shared<int8_t> to = operands.from(step % S::kStages * S::kStageBytes);
        const int k = step * S::kDepth;
        load_tile<S::kTokens, S::kDepth, S::kXStride, S::kThreads>(to, g.x, token, k);
        load_tile<S::kChannels, S::kDepth / 2, S::kValuesStride, S::kThreads>(to.from(S::kValuesAt), g.values, channel,
                                                                              k / 2);
        load_tile<S::kChannels, S::kMetaBytes, S::kMetaBytes, S::kThreads, kUnused>(to.from(S::kMetaAt), g.meta,
                                                                                    channel, k / 8);
      }
      prim::cp_async_commit();  // an empty group beyond the last step: so the waits below count alike
    };
    int32_t acc[S::kTilesC][S::kTilesT][4] = {};
    prim::sync_threads();  // the previous tile's readers
    EFFVIT_NO_UNROLL  // or registers are spilled
        for (int step = 0; step < S::kStages - 1; ++step) load(step);
    EFFVIT_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      prim::cp_async_wait<S::kStages - 2>();
      prim::sync_threads();  // this step's operands, and the readers of the step before, over which the next is copied
      load(step + S::kStages - 1);
      multiply<S>(acc, operands.from(step % S::kStages * S::kStageBytes));
    }
    prim::cp_async_wait<0>();
    prim::sync_threads();  // the readers of the operands, over which the sums are staged
    stage_sums<S>(sums, acc);
    prim::sync_threads();
    const Place at = {token, channel, static_cast<int>(least(S::kTokens, g.p.M - token)),
                      static_cast<int>(least(S::kChannels, g.p.N - channel))};
    finish_tile<Out, S::kThreads, S::kChannels>(g.p, g.access, StagedSums<S::kChannels>{sums}, at);
  }
}

// ---- plan and launch ----

template <class S>
cudaError_t launch_tiles(const Sparse24Int8LinearParams& p, cudaStream_t stream) {
  const Plan g = {p,
                  make_matrix(p.x, p.M, p.K, p.x_stride_m),
                  make_matrix(p.values, p.N, p.K / 2, p.values_stride_n),
                  make_matrix(p.meta, p.N, ceil_div(p.K, 8), ceil_div(p.K, 8)),
                  epilogue_access(p),
                  ceil_div(p.N, S::kChannels),
                  ceil_div(p.M, S::kTokens) * ceil_div(p.N, S::kChannels)};
  return dispatch_output(p.out_dtype, [&](auto out) {
    return EFFVIT_LAUNCH((sparse24_int8_linear_fwd_kernel<S, decltype(out)>), grid_size(g.units), S::kThreads,
                         S::kSharedBytes, stream, g);
  });
}

}  // namespace sparse24_int8_linear_impl
}  // namespace cuda

inline cudaError_t launch_sparse24_int8_linear_fwd(const Sparse24Int8LinearParams& p, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::sparse24_int8_linear_impl;
  if (p.M == 0 || p.N == 0) return cudaSuccess;
  prim::GlobalRanges ranges;
  ranges.read(p.x, extent_bytes(DType::kInt8, {{p.M, p.x_stride_m}, {p.K, 1}}));
  ranges.read(p.values, extent_bytes(DType::kInt8, {{p.N, p.values_stride_n}, {p.K / 2, 1}}));
  ranges.read(p.meta, tensor_bytes(DType::kUInt8, p.N * ceil_div(p.K, 8)));
  register_epilogue(ranges, p);
  const int rows = tile_rows(p.M, p.N);
  const cudaError_t error = rows == Large::kTokens    ? launch_tiles<Large>(p, stream)
                            : rows == Medium::kTokens ? launch_tiles<Medium>(p, stream)
                                                      : launch_tiles<Small>(p, stream);
  ranges.finish();
  return error;
}

}  // namespace effvit
