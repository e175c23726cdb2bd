// The epilogue of the int8 products: from exact sums in a small tile to results in memory, in one pass.
#pragma once

#include "int8_gemm.inl.h"

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace int8_impl {

#define EFFVIT_FN EFFVIT_INLINE
template <class V>
EFFVIT_INLINE V splat(float x) {
  return EFFVIT_ISA_NAME::set1(x);
}
EFFVIT_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
#include "../rows/math.h"
#undef EFFVIT_FN

template <Activation kAct>
EFFVIT_INLINE vf activate(vf y) {
  if constexpr (kAct == Activation::kRelu) {
    return max(vf{}, y);
  } else if constexpr (kAct == Activation::kGelu) {
    return y * normal_cdf_near(y);
  } else if constexpr (kAct == Activation::kSilu) {
    return y / (1.f + exp_full(-y));
  } else {
    return y;
  }
}

// What the epilogue needs of the columns of a tile, padded to whole vectors.
struct Columns {
  int64_t first = 0;
  int count = 0;
  float scale[kMostColumns], bias[kMostColumns];

  void set(const Int8Epilogue& p, int64_t column, int n) {
    first = column, count = n;
    for (int i = 0; i < kMostColumns; ++i) scale[i] = bias[i] = 0.f;
    std::memcpy(scale, p.w_scale + column, static_cast<size_t>(n) * sizeof(float));
    if (!p.bias) return;
    for (int i = 0; i < n; ++i) bias[i] = load_scalar(p.bias, p.bias_dtype, column + i);
  }
};

template <class T>
EFFVIT_INLINE vf load_first(const T* p, int n) {
  if (n >= kLanes) return load(p);
  alignas(64) T some[kLanes] = {};
  std::memcpy(some, p, static_cast<size_t>(n) * sizeof(T));
  return load(some);
}

EFFVIT_INLINE vf load_residual(const Int8Epilogue& p, int64_t at, int n) {
  switch (p.residual_dtype) {
    case DType::kFloat32:
      return load_first(static_cast<const float*>(p.residual) + at, n);
    case DType::kBFloat16:
      return load_first(static_cast<const BFloat16*>(p.residual) + at, n);
    default:
      return load_first(static_cast<const Float16*>(p.residual) + at, n);
  }
}

// Rows [row, row + rows) of the result from acc[rows][ld], of which `sums` is still to be taken: see int8_gemm.inl.h.
template <Activation kAct, class T>
void finish_rows(const Int8Epilogue& p, const int32_t* acc, int ld, const int32_t* sums, int64_t row, int rows,
                 const Columns& c) {
  // Copies: stores may alias anything.
  const Int8Epilogue e = p;
  const int count = c.count;
  const vf inverse = set1(1.f / e.out_scale);
  T* to = static_cast<T*>(e.out) + row * e.N + c.first;
  int64_t residual = row * e.residual_stride_m + c.first;
  const float* x_scale = e.x_scale + row * e.x_scale_stride;
  const auto value = [&](const int32_t* from, int r, vf scale, int i, int n) __attribute__((always_inline)) {
    vf y = fma(to_floats(load(from + i) - set1(sums[r])), scale * load(c.scale + i), load(c.bias + i));
    if (e.residual) y += load_residual(e, residual + i, n);
    return activate<kAct>(y);
  };
  for (int r = 0; r < rows; ++r, acc += ld, to += e.N, residual += e.residual_stride_m, x_scale += e.x_scale_stride) {
    const vf scale = set1(*x_scale);
    const auto at = [&](int i, int n) __attribute__((always_inline)) {
      if constexpr (std::is_same_v<T, int32_t>) {
        store_first(to + i, load(acc + i) - set1(sums[r]), n);
      } else if constexpr (std::is_same_v<T, int8_t>) {
        const vf y = value(acc, r, scale, i, n) * inverse;
        const vf q = min(max((vf)((vi)y & (y == y)), set1(-128.f)), set1(127.f));  // 0 for NaN
        store_first(to + i, round_to_int(q), n);
      } else {
        store_first(to + i, value(acc, r, scale, i, n), n);
      }
    };
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) at(i, kLanes);
    if (i < count) at(i, count - i);
  }
}

using Finish = void (*)(const Int8Epilogue&, const int32_t*, int, const int32_t*, int64_t, int, const Columns&);

template <Activation kAct>
Finish finish_of(DType out) {
  switch (out) {
    case DType::kFloat32:
      return finish_rows<kAct, float>;
    case DType::kBFloat16:
      return finish_rows<kAct, BFloat16>;
    case DType::kFloat16:
      return finish_rows<kAct, Float16>;
    case DType::kInt32:
      return finish_rows<Activation::kNone, int32_t>;
    default:
      return finish_rows<kAct, int8_t>;
  }
}

inline Finish finish_of(const Int8Epilogue& p) {
  switch (p.activation) {
    case Activation::kRelu:
      return finish_of<Activation::kRelu>(p.out_dtype);
    case Activation::kGelu:
      return finish_of<Activation::kGelu>(p.out_dtype);
    case Activation::kSilu:
      return finish_of<Activation::kSilu>(p.out_dtype);
    default:
      return finish_of<Activation::kNone>(p.out_dtype);
  }
}

template <class Params>
struct EpilogueOf {
  using Columns = int8_impl::Columns;
  static Finish choose(const Params& p) { return finish_of(p); }
};

}  // namespace int8_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
