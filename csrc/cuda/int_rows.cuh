// Integer row-wise operators on a GPU: the functor of rows/<op>.h, a warp a row, pass by pass. Rows are read again for
// each pass, from the caches. Included once for each op, EFFVIT_OP of EFFVIT_ROWS_HEADER.
#include "../rows/int_params.h"
#include "common.cuh"

namespace effvit {
namespace cuda {
namespace EFFVIT_OP {

#define EFFVIT_FN EFFVIT_DEVICE
template <class V>
EFFVIT_DEVICE V splat(uint32_t x) {
  return static_cast<V>(x);
}
#include "../rows/int_math.h"
#define EFFVIT_ROWS
#include EFFVIT_ROWS_HEADER
#undef EFFVIT_ROWS
#undef EFFVIT_FN

constexpr int kThreads = 128, kWarps = kThreads / prim::kWarpSize;

EFFVIT_DEVICE int64_t shuffle_xor64(int64_t x, int mask) {
  const uint64_t u = static_cast<uint64_t>(x);
  const uint64_t low = prim::shuffle_xor(static_cast<uint32_t>(u), mask);
  const uint64_t high = prim::shuffle_xor(static_cast<uint32_t>(u >> 32), mask);
  return static_cast<int64_t>(low | high << 32);
}

template <class F, int kPass, class Row>
EFFVIT_DEVICE void reduce_from(const IntRowsData& p, const int32_t* x, const int32_t* residual, Row& row) {
  if constexpr (kPass < F::kPasses) {
    constexpr Reduce kReduction = F::kReductions[kPass];
    constexpr bool kOrder = kReduction == Reduce::kMax || kReduction == Reduce::kRange;
    int64_t total = kOrder ? INT32_MIN : 0;
    int32_t bottom = INT32_MAX;
    EFFVIT_NO_UNROLL
    for (int64_t i = prim::lane_id(); i < p.columns; i += prim::kWarpSize) {
      const int32_t other = residual != nullptr ? prim::load_global(residual + i) : 0;
      const int32_t y = F::template term<kPass>(p, row, prim::load_global(x + i), other);
      if constexpr (kOrder) {
        total = most<int32_t>(static_cast<int32_t>(total), y), bottom = least(bottom, y);
      } else if constexpr (kReduction == Reduce::kSquares) {
        total += static_cast<int64_t>(y) * y;
      } else {
        total += y;
      }
    }
    EFFVIT_UNROLL
    for (int m = prim::kWarpSize / 2; m > 0; m /= 2) {
      if constexpr (kOrder) {
        total = most<int32_t>(static_cast<int32_t>(total), prim::shuffle_xor(static_cast<int32_t>(total), m));
        bottom = least(bottom, prim::shuffle_xor(bottom, m));
      } else {
        total += shuffle_xor64(total, m);
      }
    }
    if constexpr (kReduction == Reduce::kSaturating) total = total > 0x7fffffff ? 0x7fffffff : total;
    F::template finish<kPass>(p, row, total, bottom);
    reduce_from<F, kPass + 1>(p, x, residual, row);
  }
}

template <class F, class T>
EFFVIT_DEVICE void one_row(const IntRowsData& p, int64_t r) {
  const int32_t* const x = p.x + row_start(p, p.x_stride, r);
  const int32_t* const residual = p.residual != nullptr ? p.residual + row_start(p, p.residual_stride, r) : nullptr;
  T* const out = static_cast<T*>(p.out) + r * p.columns;
  typename F::Row row{};
  reduce_from<F, 0>(p, x, residual, row);
  EFFVIT_NO_UNROLL
  for (int64_t i = prim::lane_id(); i < p.columns; i += prim::kWarpSize) {
    const int32_t value = prim::load_global(x + i);
    const int32_t other = residual != nullptr ? prim::load_global(residual + i) : 0;
    int32_t vectors[F::kVectors + 1] = {}, kept = 0;
    EFFVIT_UNROLL
    for (int k = 0; k < F::kVectors; ++k) {
      if (p.vectors[k] != nullptr) vectors[k] = prim::load_global(p.vectors[k] + i);
    }
    if constexpr (F::kKeeps) kept = F::template term<F::kPasses - 1>(p, row, value, other);
    prim::store_global(out + i, static_cast<T>(F::map(p, row, value, kept, other, vectors)));
  }
}

template <class T>
EFFVIT_KERNEL(kThreads, 4)
int_rows_kernel(IntRowsData p) {
  const int64_t step = prim::cta_count() * kWarps;
  EFFVIT_NO_UNROLL
  for (int64_t r = prim::cta_id() * kWarps + prim::warp_id(); r < p.rows; r += step) {
    dispatch_variant(p.variant, std::make_integer_sequence<int, kVariants>(),
                     [&](auto variant) { one_row<Forward<decltype(variant)::value>, T>(p, r); });
  }
}

inline cudaError_t launch_int_rows(const IntRowsData& p, cudaStream_t stream) {
  prim::GlobalRanges ranges;
  const auto span = [&](const int64_t* stride) {
    int64_t last = p.columns - 1;
    for (int k = 0; k < p.dims; ++k) last += (p.size[k] - 1) * stride[k];
    return static_cast<uint64_t>(last + 1) * 4;
  };
  ranges.read(p.x, span(p.x_stride));
  if (p.residual != nullptr) ranges.read(p.residual, span(p.residual_stride));
  for (const int32_t* v : p.vectors) {
    if (v != nullptr) ranges.read(v, static_cast<uint64_t>(p.columns) * 4);
  }
  const int64_t bytes = element_bytes(p.out_dtype);
  ranges.write_once(p.out, static_cast<uint64_t>(p.rows * p.columns * bytes));
  const int64_t most_ctas = 4 * prim::target_ctas(), ctas = ceil_div(p.rows, kWarps);
  const int64_t grid = ctas < most_ctas ? ctas : most_ctas;
  cudaError_t error;
  if (bytes == 4) {
    error = EFFVIT_LAUNCH((int_rows_kernel<int32_t>), grid, kThreads, 0, stream, p);
  } else if (bytes == 2) {
    error = EFFVIT_LAUNCH((int_rows_kernel<int16_t>), grid, kThreads, 0, stream, p);
  } else {  // the low bytes, with or without a sign
    error = EFFVIT_LAUNCH((int_rows_kernel<int8_t>), grid, kThreads, 0, stream, p);
  }
  ranges.finish();
  return error;
}

}  // namespace EFFVIT_OP
}  // namespace cuda
}  // namespace effvit
