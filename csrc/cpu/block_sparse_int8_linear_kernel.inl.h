// block_sparse_int8_linear on the CPU: forward, on raw pointers, compiled once per ISA. The product of
// block_sparse_products.inl.h on words of four bytes where the ISA has their dot products (kInt8Dot), else of two
// int16, whose products in pairs cannot saturate; then the epilogue that all int8 products share.
//
// The operand that dot products of bytes want unsigned is x, as x + 128; what is too much is 128 times the sum of a
// channel's weights, with which the sums start. All of it wraps modulo 2^32 and ends below 2^31.
#pragma once

#include "block_sparse_products.inl.h"
#include "int8_epilogue.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace block_sparse_int8_linear_impl {

using namespace block_sparse_impl;
using Params = BlockSparseInt8LinearParams;

constexpr Kind kWords = kInt8Dot ? Kind::kBytes : Kind::kHalves;

// On AMX int8 is multiplied as it is.
bool tiled(const Params& p) { return kInt8Tiles && p.M > kFewRows; }

int64_t block_words(const Params& p) { return tiled(p) ? p.B * 16 : p.B * p.B / elements(kWords); }

// Packed blocks, then the sums of channels where they are needed.
int64_t workspace(const Params& p) { return p.Z * block_words(p) + (kInt8Dot ? p.N : 0); }

int64_t pack_units(const Params& p) { return p.N / p.B; }

// [words along j][i] of each of `count` blocks.
template <int kSize>
void pack_blocks(const Params& p, float* to, const int8_t* values, int64_t count) {
  constexpr int kAcross = kSize / elements(kWords), kSpace = kAcross * kSize;
  const int64_t stride = p.values_stride_i, stride_z = p.values_stride_z;
  if constexpr (kInt8Dot && kLanes == 16) {
    // A vector has row r of as many blocks, or halves of one, as fit.
    constexpr int kTogether = kLanes / kAcross, kBlocks = kSize == 16 ? kTogether : 1;
    for (int64_t z = 0; z < count; z += kBlocks) {
      const int there = static_cast<int>(std::min<int64_t>(kBlocks, count - z));
      vf x[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        alignas(64) int8_t words[4 * kLanes];
#pragma GCC unroll 4
        for (int g = 0; g < kTogether; ++g) {
          const int8_t* const from = kBlocks > 1 ? values + (z + std::min(g, there - 1)) * stride_z + r * stride
                                                 : values + z * stride_z + (g * kLanes + r) * stride;
          std::memcpy(words + g * kSize, from, kSize);
        }
        std::memcpy(&x[r], words, sizeof(vf));
      }
      transpose_block(x);
      float* const block = to + z * kSpace;
      for (int i = 0; i < there * kLanes / kBlocks; ++i) {
        const int g = i / kAcross, s = i % kAcross;
        store(block + (kBlocks > 1 ? g * kSpace : g * kLanes) + s * kSize, x[i]);
      }
    }
    return;
  }
  for (int64_t z = 0; z < count; ++z, to += kSpace) {
    for (int i = 0; i < kSize; ++i) {
      const int8_t* const from = values + z * stride_z + i * stride;
      for (int s = 0; s < kAcross; ++s) {
        char* const word = reinterpret_cast<char*>(to + s * kSize + i);
        if constexpr (kInt8Dot) {
          std::memcpy(word, from + 4 * s, 4);
        } else {
          const int16_t two[2] = {from[2 * s], from[2 * s + 1]};
          std::memcpy(word, two, 4);
        }
      }
    }
  }
}

template <int kSize>
void pack_row(const Params& p, float* packed, int32_t* sums, int64_t row) {
  const int64_t start = p.crow[row], count = p.crow[row + 1] - start;
  if (tiled(p)) {
    constexpr int kFloats = kSize * kSize / elements(kWords);
    for (int64_t z = start; z < start + count; ++z) {
      alignas(64) float some[kFloats];
      pack_blocks<kSize>(p, some, p.values + z * p.values_stride_z, 1);
      pack_tiles<kSize>(packed + z * block_words(p), some, kFloats / kSize);
    }
    return;
  }
  pack_blocks<kSize>(p, packed + start * block_words(p), p.values + start * p.values_stride_z, count);
#if defined(EFFVIT_HAS_INT8_DOT)
  const int64_t first = start * block_words(p), last = first + count * block_words(p);
  for (int i = 0; i < kSize; i += kLanes) {
    vi sum{};
    for (int64_t at = first; at < last; at += kSize) sum = dot_bytes(sum, set1(0x01010101), (vi)load(packed + at + i));
    store(sums + row * kSize + i, sum * -128);
  }
#else
  static_cast<void>(sums);
#endif
}

int32_t* sums_of(const Params& p, float* workspace) {
  return kInt8Dot ? reinterpret_cast<int32_t*>(workspace + p.Z * block_words(p)) : nullptr;
}

void pack(const Params& p, float* workspace, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (p.B == 16)
      pack_row<16>(p, workspace, sums_of(p, workspace), row);
    else
      pack_row<32>(p, workspace, sums_of(p, workspace), row);
  }
}

struct Sink {
  const Params& p;
  int8_impl::Finish finish;
  int8_impl::Columns c;

  EFFVIT_INLINE void columns(int64_t column) { c.set(p, column, p.B); }
  EFFVIT_INLINE void operator()(const float* acc, int64_t row, int rows, int64_t) const {
    static const int32_t kNothing[kTileRows] = {};
    finish(p, reinterpret_cast<const int32_t*>(acc), p.B, kNothing, row, rows, c);
  }
};

Chunks chunks_of(const Params& p) {
  if (tiled(p)) return {p.M, p.N / p.B, p.K / p.B * 16, p.Z * p.B * p.B / 16, kTileRows};
  const int tile = p.B == 16 ? kTile<16> : kTile<32>;
  return {p.M, p.N / p.B, p.K / elements(kWords), p.Z * p.B * p.B / elements(kWords), tile};
}

int64_t units(const Params& p) {
  const Chunks chunks = chunks_of(p);
  return chunks.m * chunks.n;
}

void run(const Params& p, float* workspace, int64_t begin, int64_t end) {
  LeadingRows rows;
  rows.size[0] = p.M, rows.dims = 1;
  const Product product = {{p.x, DType::kInt8, &rows, &p.x_stride_m},
                           p.M,
                           p.K,
                           p.N / p.B,
                           workspace,
                           p.crow,
                           p.columns,
                           nullptr,
                           sums_of(p, workspace)};
  Sink sink = {p, int8_impl::finish_of(p), {}};
#if defined(EFFVIT_HAS_INT8_DOT) && defined(EFFVIT_HAS_TILES)
  if (tiled(p)) {
    p.B == 16 ? run_tiles<int8_t, 16>(product, chunks_of(p), begin, end, sink)
              : run_tiles<int8_t, 32>(product, chunks_of(p), begin, end, sink);
    return;
  }
#endif
  if (p.B == 16)
    run_product<16, kWords>(product, chunks_of(p), begin, end, sink);
  else
    run_product<32, kWords>(product, chunks_of(p), begin, end, sink);
}

constexpr Step<Params> kForward[] = {{pack_units, pack}, {units, run}};

}  // namespace block_sparse_int8_linear_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME

namespace effvit::cpu {
const Kernel<BlockSparseInt8LinearParams>* EFFVIT_KERNEL_NAME(block_sparse_int8_linear)() {
  namespace impl = EFFVIT_ISA_NAME::block_sparse_int8_linear_impl;
  static constexpr Kernel<BlockSparseInt8LinearParams> kernel = {routine(impl::kForward, impl::workspace), {}};
  return &kernel;
}
}  // namespace effvit::cpu
