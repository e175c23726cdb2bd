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
EFFVIT_DEVICE uint64_t exact_root(uint64_t) { return 0; }  // in integers
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

// x in 32 bits; bytes without a sign are given one where 128 says so.
template <class X>
EFFVIT_DEVICE int32_t load_integer(const X* p, int32_t sign) {
  const int32_t x = prim::load_global(p);
  return sizeof(X) == 1 ? (x ^ sign) - sign : x;
}
EFFVIT_HD int32_t sign_of(DType type) { return type == DType::kInt8 ? 128 : 0; }

// An element of a row of any dtype: the same one in all threads.
EFFVIT_DEVICE int32_t load_any(const void* p, DType type, int64_t i) {
  if (type == DType::kInt32) return prim::load_global(static_cast<const int32_t*>(p) + i);
  if (type == DType::kInt16) return prim::load_global(static_cast<const int16_t*>(p) + i);
  return load_integer(static_cast<const uint8_t*>(p) + i, sign_of(type));
}
EFFVIT_DEVICE void store_any(void* p, DType type, int64_t i, int32_t x) {
  if (type == DType::kInt32) {
    prim::store_global(static_cast<int32_t*>(p) + i, x);
  } else if (type == DType::kInt16) {
    prim::store_global(static_cast<int16_t*>(p) + i, static_cast<int16_t>(x));
  } else {  // the low byte, with or without a sign
    prim::store_global(static_cast<int8_t*>(p) + i, static_cast<int8_t>(x));
  }
}

// A row's reductions; load(i) is its element i.
template <class F, int kPass, class Row, class Load>
EFFVIT_DEVICE void reduce_from(const IntRowsData& p, const Load& load, Row& row) {
  if constexpr (kPass < F::kPasses) {
    constexpr Reduce kReduction = F::kReductions[kPass];
    constexpr bool kOrder = kReduction == Reduce::kMax || kReduction == Reduce::kRange;
    int64_t total = kOrder ? INT32_MIN : 0;
    int32_t bottom = INT32_MAX;
    EFFVIT_NO_UNROLL
    for (int64_t i = prim::lane_id(); i < p.columns; i += prim::kWarpSize) {
      const int32_t y = F::template term<kPass>(p, row, load(i));
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
    reduce_from<F, kPass + 1>(p, load, row);
  }
}

// The results of row r; other(i) is the residual's element i.
template <class F, class Load, class Other>
EFFVIT_DEVICE void results_of(const IntRowsData& p, int64_t r, const Load& load, const Other& other) {
  typename F::Row row{};
  reduce_from<F, 0>(p, load, row);
  EFFVIT_NO_UNROLL
  for (int64_t i = prim::lane_id(); i < p.columns; i += prim::kWarpSize) {
    const int32_t value = load(i);
    int32_t vectors[F::kVectors + 1] = {}, kept = 0;
    EFFVIT_UNROLL
    for (int k = 0; k < F::kVectors; ++k) {
      if (p.vectors[k] != nullptr) vectors[k] = prim::load_global(p.vectors[k] + i);
    }
    if constexpr (F::kKeeps) kept = F::template term<F::kPasses - 1>(p, row, value);
    store_any(p.out, p.out_dtype, r * p.columns + i, F::map(p, row, value, kept, other(i), vectors));
  }
}

template <class F, class X>
EFFVIT_DEVICE void one_row(const IntRowsData& p, int64_t r) {
  const X* const x = static_cast<const X*>(p.x) + row_start(p, p.x_stride, r);
  const int32_t sign = sign_of(p.x_dtype);
  const int64_t start = p.residual != nullptr ? row_start(p, p.residual_stride, r) : 0;
  const auto load = [&](int64_t i) { return load_integer(x + i, sign); };
  const auto other = [&](int64_t i) {
    return p.residual != nullptr ? load_any(p.residual, p.residual_dtype, start + i) : 0;
  };
  if constexpr (F::kAdds) {  // every lane reads again what it has written itself
    int16_t* const sum = p.sum + r * p.columns;
    const int32_t* const* const v = p.vectors + F::kScales;
    EFFVIT_NO_UNROLL
    for (int64_t i = prim::lane_id(); i < p.columns; i += prim::kWarpSize) {
      const int32_t m = prim::load_global(v[0] + i), c = shift_of(prim::load_global(v[1] + i));
      const int32_t m2 = prim::load_global(v[2] + i), c2 = shift_of(prim::load_global(v[3] + i));
      const int32_t y = rescale_sum(load(i), m, c, other(i), m2, c2, p.sum_low, p.sum_high);
      prim::store_global(sum + i, static_cast<int16_t>(y));
    }
    const auto sums = [&](int64_t i) { return static_cast<int32_t>(prim::load_global(sum + i)); };
    results_of<F>(p, r, sums, [](int64_t) { return 0; });
  } else {
    results_of<F>(p, r, load, other);
  }
}

template <class X>
EFFVIT_KERNEL(kThreads, 4)
int_rows_kernel(IntRowsData p) {
  const int64_t step = prim::cta_count() * kWarps;
  EFFVIT_NO_UNROLL
  for (int64_t r = prim::cta_id() * kWarps + prim::warp_id(); r < p.rows; r += step) {
    dispatch_variant(p.variant, std::make_integer_sequence<int, kVariants>(),
                     [&](auto variant) { one_row<Forward<decltype(variant)::value>, X>(p, r); });
  }
}

inline cudaError_t launch_int_rows(const IntRowsData& p, cudaStream_t stream) {
  prim::GlobalRanges ranges;
  const auto read = [&](const void* data, DType type, const int64_t* stride) {
    int64_t last = p.columns - 1;
    for (int k = 0; k < p.dims; ++k) last += (p.size[k] - 1) * stride[k];
    ranges.read(data, static_cast<uint64_t>((last + 1) * element_bytes(type)));
  };
  read(p.x, p.x_dtype, p.x_stride);
  if (p.residual != nullptr) read(p.residual, p.residual_dtype, p.residual_stride);
  for (const int32_t* v : p.vectors) {
    if (v != nullptr) ranges.read(v, static_cast<uint64_t>(p.columns) * 4);
  }
  const int64_t bytes = element_bytes(p.x_dtype);
  ranges.write_once(p.out, static_cast<uint64_t>(p.rows * p.columns * element_bytes(p.out_dtype)));
  if (p.sum != nullptr) ranges.write_once(p.sum, static_cast<uint64_t>(p.rows * p.columns) * sizeof(int16_t));
  const int64_t most_ctas = 4 * prim::target_ctas(), ctas = ceil_div(p.rows, kWarps);
  const int64_t grid = ctas < most_ctas ? ctas : most_ctas;
  cudaError_t error;
  if (bytes == 4) {
    error = EFFVIT_LAUNCH((int_rows_kernel<int32_t>), grid, kThreads, 0, stream, p);
  } else if (bytes == 2) {
    error = EFFVIT_LAUNCH((int_rows_kernel<int16_t>), grid, kThreads, 0, stream, p);
  } else {
    error = EFFVIT_LAUNCH((int_rows_kernel<uint8_t>), grid, kThreads, 0, stream, p);
  }
  ranges.finish();
  return error;
}

}  // namespace EFFVIT_OP
}  // namespace cuda
}  // namespace effvit
