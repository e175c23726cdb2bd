// Metadata of 2:4 weights, from the canonical order to those that CUTLASS's kernels read: device code and launch.
//
// A word is the four bytes of 32 neighbours along K of one row. Either order only moves words, and pads.
#pragma once
#include "choice.h"
#include "../tile/plan.cuh"

namespace effvit {
namespace cuda {
namespace sparse24_meta_impl {

using namespace tile;

constexpr int kMetaThreads = 256;
constexpr uint32_t kPadding = 0xeeeeeeeeu;  // zeros would be undefined

// A word of the result, and where it comes from: row and word of the canonical metadata.
struct Origin {
  int64_t row, word;
};

// sm_80: rows are regrouped by 16, of 2 x 2 words those off the diagonal change places, pairs of columns lie together.
EFFVIT_DEVICE Origin origin_sm80(int64_t i, int64_t rows) {
  const int64_t pair = i / (2 * rows), rest = i - pair * 2 * rows;
  const int64_t row = rest / 2, odd_word = rest % 2;
  const int64_t moved = row % 2;  // the place (row, odd_word) has what was at (row - row % 2 + odd_word, row % 2)
  const int64_t grouped = row - moved + odd_word, in_group = grouped % 16;
  return {grouped - in_group + in_group % 2 * 8 + in_group / 2, 2 * pair + moved};
}

// sm_90: for every 128 of K all rows, 16 bytes each.
EFFVIT_DEVICE Origin origin_sm90(int64_t i, int64_t rows) {
  const int64_t tile = i / (4 * rows), rest = i - tile * 4 * rows;
  return {rest / 4, 4 * tile + rest % 4};
}

template <CutlassArch kArch>
EFFVIT_KERNEL(kMetaThreads, 1)
sparse24_meta_kernel(const uint8_t* meta, int64_t N, int64_t words, int64_t rows, int64_t count, uint32_t* out) {
  const int64_t step = prim::cta_count() * kMetaThreads;
  EFFVIT_NO_UNROLL
  for (int64_t i = prim::cta_id() * kMetaThreads + prim::thread_id(); i < count; i += step) {
    const Origin from = kArch == CutlassArch::kSm80 ? origin_sm80(i, rows) : origin_sm90(i, rows);
    uint32_t word = kPadding;
    if (from.row < N && from.word < words)
      word = prim::load_global_vec<uint32_t>(meta + (from.row * words + from.word) * 4);
    prim::store_global(out + i, word);
  }
}

}  // namespace sparse24_meta_impl
}  // namespace cuda

// meta: [N, K / 8], contiguous, aligned to 4 bytes, K a multiple of 32; out: cutlass_meta_bytes.
inline cudaError_t launch_sparse24_meta(const uint8_t* meta, int64_t N, int64_t K, cuda::CutlassArch arch, void* out,
                                        cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::sparse24_meta_impl;
  const bool sm80 = arch == CutlassArch::kSm80;
  const int64_t bytes = cutlass_meta_bytes(N, K, arch), words = K / 32, group = sm80 ? 16 : 64;
  const int64_t rows = ceil_div(N, group) * group, count = bytes / 4;
  if (count == 0) return cudaSuccess;
  prim::GlobalRanges ranges;
  ranges.read(meta, tensor_bytes(DType::kUInt8, N * words * 4));
  ranges.write_once(out, static_cast<uint64_t>(bytes));
  const int64_t ctas = grid_size(ceil_div(count, kMetaThreads));
  uint32_t* const to = static_cast<uint32_t*>(out);
  const cudaError_t error = sm80 ? EFFVIT_LAUNCH((sparse24_meta_kernel<CutlassArch::kSm80>), ctas, kMetaThreads, 0,
                                                 stream, meta, N, words, rows, count, to)
                                 : EFFVIT_LAUNCH((sparse24_meta_kernel<CutlassArch::kSm90>), ctas, kMetaThreads, 0,
                                                 stream, meta, N, words, rows, count, to);
  ranges.finish();
  return error;
}

}  // namespace effvit
