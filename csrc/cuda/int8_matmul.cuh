// int8_matmul: device code and launch, on prim only.
//
// A CTA of four warps computes tiles of 64 x 64, 64 of the depth at once, one step ahead. Both operands lie in shared
// memory with the depth last, as int8: of uint8 and int16 as two or three planes of digits of seven bits, the highest
// one with the sign. What is plain int8 with the depth last is copied asynchronously where it is aligned; the rest goes
// through registers, and columns are transposed there.
//
// A digit times a digit over 64 is below 2^20, so that the products of one weight add up in int32; over all of K they
// are in int64, or, of int8, in int32 up to K = 131071.
#pragma once
#include "int8_tiles.cuh"
#include "int_math.cuh"

namespace effvit {
namespace cuda {
namespace int8_matmul_impl {

using namespace int_impl;
using int8_impl::load_tile;
using int8_impl::Matrix;

constexpr int kSide = 64, kDepth = 64;
constexpr int kStride = row_stride<int8_t>(kDepth), kPlane = kSide * kStride;
static_assert(conflict_free<int8_t>(kDepth), "row stride must be an odd multiple of 16 bytes");
constexpr int kColumnTiles = kSide / 8;

// An operand of one batch.
struct Side {
  const void* base;
  int64_t rows, stride;  // of what is stored, in elements
  bool vec;  // rows start at multiples of 16 bytes, of columns at multiples of 4 elements and have so many
};

struct Plan {
  Int8MatmulParams p;
  bool a_vec, b_vec;
  int64_t row_tiles, column_tiles, units;
};

template <class T>
constexpr int kDigitsOf = std::is_same<T, int8_t>::value    ? 1
                          : std::is_same<T, uint8_t>::value ? 2
                                                            : 3;

template <class T>
EFFVIT_DEVICE int8_t digit_of(T x, int i) {
  constexpr int kDigits = kDigitsOf<T>;
  const int32_t y = static_cast<int32_t>(x) >> (7 * i);
  return static_cast<int8_t>(i == kDigits - 1 ? y : y & 127);
}

// 64 rows from `row` on, 64 of their numbers from k on, zeros beyond: planes of digits.
template <class T>
EFFVIT_DEVICE void load_rows(const Shared<int8_t>& to, const Side& from, int64_t row, int64_t k, int64_t depth) {
  const T* const base = static_cast<const T*>(from.base);
  if constexpr (kDigitsOf<T> == 1) {
    const Matrix m = {base, from.rows, from.stride, static_cast<int32_t>(depth), from.vec};
    load_tile<kSide, kDepth, kStride, kThreads>(to, m, row, static_cast<int>(k));
  } else {
    constexpr int kPieces = kDepth / kVec<T>;
    EFFVIT_NO_UNROLL
    for (int i = prim::thread_id(); i < kSide * kPieces; i += kThreads) {
      const int r = i / kPieces, c = i % kPieces * kVec<T>;
      const int n = piece_length<T>(row + r < from.rows ? static_cast<int>(least(depth - k, kDepth)) - c : 0);
      const Piece<T> x = load_piece<T>(base + (row + r) * from.stride + k + c, n, from.vec);
      EFFVIT_UNROLL
      for (int digit = 0; digit < kDigitsOf<T>; ++digit) {
        Vec<int8_t, kVec<T>> y;
        EFFVIT_UNROLL
        for (int e = 0; e < kVec<T>; ++e) y.v[e] = digit_of(x.v[e], digit);
        to.store_vec(digit * kPlane + r * kStride + c, y);
      }
    }
  }
}

// Likewise of [depth, columns]: 64 columns from `column` on, as rows.
template <class T>
EFFVIT_DEVICE void load_columns(const Shared<int8_t>& to, const Side& from, int64_t column, int64_t k,
                                int64_t columns) {
  const T* const base = static_cast<const T*>(from.base) + k * from.stride + column;
  const int64_t rows = from.rows - k, width = columns - column;
  EFFVIT_NO_UNROLL
  for (int i = prim::thread_id(); i < 256; i += kThreads) {
    const int group = i % 16, first = i / 16 * 4, c = 4 * group;
    Vec<T, 4> x[4];
    EFFVIT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const T* const at = base + (first + j) * from.stride + c;
      const bool there = first + j < rows;
      if (there && from.vec && c < width) {
        x[j] = prim::load_global_vec<Vec<T, 4>>(at);
      } else {
        EFFVIT_UNROLL
        for (int e = 0; e < 4; ++e) x[j].v[e] = there && c + e < width ? prim::load_global(at + e) : T{};
      }
    }
    EFFVIT_UNROLL
    for (int digit = 0; digit < kDigitsOf<T>; ++digit) {
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) {
        Vec<int8_t, 4> y;
        EFFVIT_UNROLL
        for (int j = 0; j < 4; ++j) y.v[j] = digit_of(x[j].v[e], digit);
        to.store_vec(digit * kPlane + (c + e) * kStride + first, y);
      }
    }
  }
}

// total += A B over a step of the depth, for this warp's 16 rows.
template <int kA, int kB, class Total>
EFFVIT_DEVICE void multiply(Total (&total)[kColumnTiles][4], const Shared<int8_t>& a, const Shared<int8_t>& b) {
  const Ldmatrix at;
  const int a_at = (warp_row() + at.low + at.half) * kStride + 2 * at.quarter;
  const int b_at = (at.low + at.quarter) * kStride + 2 * at.half;
  uint32_t x[kA][2][4];
  EFFVIT_UNROLL
  for (int i = 0; i < kA; ++i) {
    EFFVIT_UNROLL
    for (int s = 0; s < 2; ++s) prim::ldmatrix_x4<false>(x[i][s], a, i * kPlane + a_at + 32 * s);
  }
  EFFVIT_UNROLL
  for (int n = 0; n < kColumnTiles; n += 2) {
    uint32_t y[kB][2][4];
    EFFVIT_UNROLL
    for (int j = 0; j < kB; ++j) {
      EFFVIT_UNROLL
      for (int s = 0; s < 2; ++s) prim::ldmatrix_x4<false>(y[j][s], b, j * kPlane + b_at + n * 8 * kStride + 32 * s);
    }
    EFFVIT_UNROLL
    for (int weight = 0; weight < kA + kB - 1; ++weight) {
      int32_t sum[2][4] = {};
      EFFVIT_UNROLL
      for (int i = 0; i < kA; ++i) {
        const int j = weight - i;
        if (j < 0 || j >= kB) continue;
        EFFVIT_UNROLL
        for (int s = 0; s < 2; ++s) {
          prim::mma_m16n8k32(sum[0], x[i][s], y[j][s][0], y[j][s][1]);
          prim::mma_m16n8k32(sum[1], x[i][s], y[j][s][2], y[j][s][3]);
        }
      }
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) {
        total[n][e] += static_cast<Total>(sum[0][e]) * (1 << (7 * weight));
        total[n + 1][e] += static_cast<Total>(sum[1][e]) * (1 << (7 * weight));
      }
    }
  }
}

template <class A, class B, class Total>
EFFVIT_KERNEL(kThreads, 2)
int8_matmul_fwd_kernel(EFFVIT_GRID_CONSTANT Plan g) {
  constexpr int kA = kDigitsOf<A>, kB = kDigitsOf<B>, kStage = (kA + kB) * kPlane;
  const Int8MatmulParams& p = g.p;
  const Shared<int8_t> operands(0, 2 * kStage);
  const int64_t steps = ceil_div(p.K, kDepth);
  EFFVIT_NO_UNROLL
  for (int64_t unit = prim::cta_id(); unit < g.units; unit += prim::cta_count()) {
    int64_t batch = unit;
    const int64_t column = take_index(batch, g.column_tiles) * kSide, row = take_index(batch, g.row_tiles) * kSide;
    const Side a = {static_cast<const A*>(p.a) + matrix_start(p, p.a_stride, batch), p.M, p.a_row, g.a_vec};
    const Side b = {static_cast<const B*>(p.b) + matrix_start(p, p.b_stride, batch), p.transpose_b ? p.N : p.K, p.b_row,
                    g.b_vec};
    const auto load = [&](int64_t step) {
      if (step < steps) {
        const Shared<int8_t> to = operands.from(static_cast<int>(step % 2) * kStage);
        load_rows<A>(to, a, row, step * kDepth, p.K);
        if (p.transpose_b) {
          load_rows<B>(to.from(kA * kPlane), b, column, step * kDepth, p.K);
        } else {
          load_columns<B>(to.from(kA * kPlane), b, column, step * kDepth, p.N);
        }
      }
      prim::cp_async_commit();
    };
    Total total[kColumnTiles][4] = {};
    prim::sync_threads();  // the previous unit's readers
    load(0);
    EFFVIT_NO_UNROLL
    for (int64_t step = 0; step < steps; ++step) {
      prim::cp_async_wait<0>();  // all of it: copies are one step ahead
      prim::sync_threads();  // this step's operands; readers of what is copied over
      load(step + 1);
      const Shared<int8_t> from = operands.from(static_cast<int>(step % 2) * kStage);
      multiply<kA, kB>(total, from, from.from(kA * kPlane));
    }
    prim::cp_async_wait<0>();
    EFFVIT_UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
      EFFVIT_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int64_t r = row + acc_row() + e / 2 * 8, c = column + n * 8 + acc_col() + e % 2;
        if (r < p.M && c < p.N)
          store_integer(p.out, (batch * p.M + r) * p.N + c, p.out_dtype, finished(p.rescale, total[n][e]));
      }
    }
  }
}

// ---- plan and launch ----

template <class F>
cudaError_t dispatch_operand(DType type, const F& f) {
  if (type == DType::kInt8) return f(int8_t{});
  if (type == DType::kUInt8) return f(uint8_t{});
  return f(int16_t{});
}

inline bool aligned(const Int8MatmulParams& p, const void* base, DType type, const int64_t* stride, int64_t row,
                    int64_t bytes) {
  const int64_t size = element_bytes(type);
  bool ok = reinterpret_cast<uintptr_t>(base) % static_cast<uint64_t>(bytes) == 0 && row * size % bytes == 0;
  for (int k = 0; k < p.dims; ++k) ok = ok && (p.size[k] == 1 || stride[k] * size % bytes == 0);
  return ok;
}

inline uint64_t operand_bytes(const Int8MatmulParams& p, DType type, const int64_t* stride, int64_t rows, int64_t row,
                              int64_t columns) {
  int64_t last = (rows - 1) * row + columns - 1;
  for (int k = 0; k < p.dims; ++k) last += (p.size[k] - 1) * stride[k];
  return static_cast<uint64_t>((last + 1) * element_bytes(type));
}

}  // namespace int8_matmul_impl
}  // namespace cuda

inline cudaError_t launch_int8_matmul_fwd(const Int8MatmulParams& p, cudaStream_t stream) {
  using namespace cuda;
  using namespace cuda::int8_matmul_impl;
  if (p.batches == 0 || p.M == 0 || p.N == 0) return cudaSuccess;
  Plan g = {};
  g.p = p;
  g.a_vec = aligned(p, p.a, p.a_dtype, p.a_stride, p.a_row, 16);
  const int64_t four = 4 * element_bytes(p.b_dtype);
  g.b_vec =
      aligned(p, p.b, p.b_dtype, p.b_stride, p.b_row, p.transpose_b ? 16 : four) && (p.transpose_b || p.N % 4 == 0);
  g.row_tiles = ceil_div(p.M, kSide), g.column_tiles = ceil_div(p.N, kSide);
  g.units = p.batches * g.row_tiles * g.column_tiles;
  prim::GlobalRanges ranges;
  if (p.K > 0) {
    ranges.read(p.a, operand_bytes(p, p.a_dtype, p.a_stride, p.M, p.a_row, p.K));
    ranges.read(p.b, p.transpose_b ? operand_bytes(p, p.b_dtype, p.b_stride, p.N, p.b_row, p.K)
                                   : operand_bytes(p, p.b_dtype, p.b_stride, p.K, p.b_row, p.N));
  }
  ranges.write_once(p.out, tensor_bytes(p.out_dtype, p.batches * p.M * p.N));
  const int64_t grid = grid_size(g.units);
  const cudaError_t error = dispatch_operand(p.a_dtype, [&](auto a) {
    return dispatch_operand(p.b_dtype, [&](auto b) {
      using A = decltype(a);
      using B = decltype(b);
      constexpr int kBytes = 2 * (kDigitsOf<A> + kDigitsOf<B>)*kPlane;
      if constexpr (kDigitsOf<A> + kDigitsOf<B> == 2) {
        if (p.K < 131072)
          return EFFVIT_LAUNCH((int8_matmul_fwd_kernel<A, B, int32_t>), grid, kThreads, kBytes, stream, g);
      }
      return EFFVIT_LAUNCH((int8_matmul_fwd_kernel<A, B, int64_t>), grid, kThreads, kBytes, stream, g);
    });
  });
  ranges.finish();
  return error;
}

}  // namespace effvit
