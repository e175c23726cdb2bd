// Products of int8 with a dense weight, plain or packed: a plain one is packed first. `Params` are Int8LinearParams, or
// have their names of x, weight and sizes.
#pragma once

#include "int8_gemm.inl.h"
#include "int8_tiles.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace int8_impl {

template <class Params>
int64_t packed_width(const Params& p) {
  return 64 * (ceil_div(p.K, 4) + 1);
}

// A plain weight is packed first.
template <class Params>
int64_t workspace(const Params& p) {
  return p.packed ? 0 : ceil_div(p.N, kBlock) * packed_width(p) / 4;
}

template <class Params>
int64_t pack_units(const Params& p) {
  return p.packed ? 0 : ceil_div(p.N, kBlock);
}

template <class Params>
void pack(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const int64_t groups = p.K / 4, rest = p.K % 4, width = packed_width(p);
  for (int64_t block = begin; block < end; ++block) {
    uint8_t* const to = reinterpret_cast<uint8_t*>(workspace) + block * width;
    const int columns = static_cast<int>(std::min<int64_t>(kBlock, p.N - block * kBlock));
    const int8_t* const from = p.weight + block * kBlock * p.weight_stride_n;
    const int64_t stride = p.weight_stride_n;
    int64_t g = 0;
    if (columns == kBlock) {
      for (; g + kLanes <= groups; g += kLanes) {
        for (int c = 0; c < kBlock; c += kLanes) {
          vf x[kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i)
            x[i] = (vf)((vi)load(reinterpret_cast<const float*>(from + (c + i) * stride + 4 * g)) ^
                        set1(static_cast<int32_t>(0x80808080)));
          transpose_block(x);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(to + 64 * (g + i)) + c, x[i]);
        }
      }
    }
    for (; 4 * g < p.K; ++g) {
      for (int c = 0; c < kBlock; ++c) {
        const int n = g < groups ? 4 : static_cast<int>(rest);
        const int32_t word =
            (c < columns ? load_bytes(from + c * stride + 4 * g, n) : 0) ^ static_cast<int32_t>(0x80808080);
        std::memcpy(to + 64 * g + 4 * c, &word, 4);
      }
    }
  }
}

template <class Params>
void run_dense(const Params& p, float* workspace, int64_t begin, int64_t end) {
  const PackedWeights weights = {
      p.packed ? reinterpret_cast<const uint8_t*>(p.weight) : reinterpret_cast<uint8_t*>(workspace),
      p.packed ? p.weight_stride_n : packed_width(p)};
#if defined(EFFVIT_HAS_INT8_DOT)
#if defined(EFFVIT_HAS_TILES)
  if (p.M > kRowsOfTile / 2) return run_units<AmxTiles>(p, weights, begin, end);
#endif
  run_units<DotTiles>(p, weights, begin, end);
#else
  run_units<HalvesTiles>(p, weights, begin, end);
#endif
}

// Its steps; its workspace is `workspace`.
template <class Params>
struct Dense {
  static constexpr Step<Params> kSteps[] = {{pack_units<Params>, pack<Params>}, {units<Params>, run_dense<Params>}};
};

}  // namespace int8_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
