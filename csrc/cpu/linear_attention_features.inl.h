// linear_attention on the CPU: feature maps, rows of features on their way to products, normalisers, scores within
// chunks. Included by linear_attention_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace linear_attention_impl {

template <FeatureMap F>
EFFVIT_INLINE vf feature(vf x) {
  if constexpr (F == FeatureMap::kRelu) return max(vf{}, x);  // a NaN is the second operand, and stays
  if constexpr (F == FeatureMap::kElu1) return x > vf{} ? x + set1(1.f) : exp_full(x);
  if constexpr (F == FeatureMap::kExp) return exp_full(x);
  return x;
}

// The derivative, from the feature itself: elu(x) + 1 is above 1 exactly where its slope is 1.
template <FeatureMap F>
EFFVIT_INLINE vf feature_slope(vf y) {
  if constexpr (F == FeatureMap::kRelu) return (vf)((vi)set1(1.f) & ~(y <= vf{}));
  if constexpr (F == FeatureMap::kElu1) return min(set1(1.f), y);
  if constexpr (F == FeatureMap::kExp) return y;
  return set1(1.f);
}

template <class F>
EFFVIT_INLINE void dispatch_map(FeatureMap map, const F& f) {
  switch (map) {
    case FeatureMap::kNone:
      return f(std::integral_constant<FeatureMap, FeatureMap::kNone>{});
    case FeatureMap::kRelu:
      return f(std::integral_constant<FeatureMap, FeatureMap::kRelu>{});
    case FeatureMap::kElu1:
      return f(std::integral_constant<FeatureMap, FeatureMap::kElu1>{});
    default:
      return f(std::integral_constant<FeatureMap, FeatureMap::kExp>{});
  }
}

constexpr int kSums = 4;  // rows are added up in turn, kSums each: short sums lose little, and none waits for the last

// dst[i] = phi(src[i]) * weight[i], rows of round_up(width, kLanes) floats with zeros behind the width. Null weight: 1.
// z, where given, takes the sum of the rows.
template <FeatureMap F, class T>
void pack_features(float* dst, const T* src, int64_t stride, int n, int width, const float* weight, float* z) {
  const int padded = round_up(width, kLanes);
  const auto columns = [&](int c, auto vectors, auto partial) {
    constexpr int kVectors = decltype(vectors)::value;
    const auto row = [&](int i, vf(&to_sum)[kVectors]) __attribute__((always_inline)) {
      const T* from = src + i * stride + c;
      float* to = dst + i * padded + c;
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        vf x;
        if constexpr (decltype(partial)::value) {
          x = first_lanes(feature<F>(load_lanes(from, width - c)), width - c);
        } else {
          x = feature<F>(load(from + j * kLanes));
        }
        if (weight) x = x * set1(weight[i]);
        store(to + j * kLanes, x);
        to_sum[j] = to_sum[j] + x;
      }
    };
    for (int i = 0; i < n;) {
      vf sum[kSums][kVectors] = {};
      const int end = std::min(n, i + kSums * kSums);
      for (; i + kSums <= end; i += kSums) {
#pragma GCC unroll 4
        for (int s = 0; s < kSums; ++s) row(i + s, sum[s]);
      }
      for (; i < end; ++i) row(i, sum[0]);
      if (!z) continue;
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        const vf total = (sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j]);
        add_compensated(z + c + j * kLanes, z + padded + c + j * kLanes, total);
      }
    }
  };
  int c = 0;
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) columns(c, std::integral_constant<int, 2>{}, std::false_type{});
  for (; c + kLanes <= width; c += kLanes) columns(c, std::integral_constant<int, 1>{}, std::false_type{});
  if (c < width) columns(c, std::integral_constant<int, 1>{}, std::true_type{});
}

template <class T>
EFFVIT_INLINE void pack_features(FeatureMap map, float* dst, const T* src, int64_t stride, int n, int width,
                                 const float* weight = nullptr, float* z = nullptr) {
  dispatch_map(map, [&](auto f) { pack_features<decltype(f)::value>(dst, src, stride, n, width, weight, z); });
}

// dst[i] = phi(src[i]) * factor[i], in float32 or rounded, rows of `ld` elements with zeros behind the width. Null
// factor: 1. Where z is given dots[i] = phi(src[i]) . z, of what is neither scaled nor rounded.
template <FeatureMap F, class E, class T>
void pack_feature_rows(E* dst, int ld, const T* src, int64_t stride, int n, int width, const float* factor,
                       const float* z, float* dots) {
  for (int i = 0; i < n; ++i) {
    const T* from = src + i * stride;
    E* to = dst + int64_t{i} * ld;
    const vf by = set1(factor ? factor[i] : 1.f);
    vf total{};
    const auto put = [&](int c, vf x) __attribute__((always_inline)) {
      if (z) total = fma(x, load(z + c), total);
      store(to + c, factor ? x * by : x);
    };
    int c = 0;
    for (; c + kLanes <= width; c += kLanes) put(c, feature<F>(load(from + c)));
    if (c < width) {
      put(c, first_lanes(feature<F>(load_lanes(from + c, width - c)), width - c));
      c += kLanes;
    }
    for (; c < ld; c += kLanes) store(to + c, vf{});
    if (z) dots[i] = reduce_add(total);
  }
}
template <class E, class T>
EFFVIT_INLINE void pack_feature_rows(FeatureMap map, E* dst, int ld, const T* src, int64_t stride, int n, int width,
                                     const float* factor = nullptr, const float* z = nullptr, float* dots = nullptr) {
  dispatch_map(map,
               [&](auto f) { pack_feature_rows<decltype(f)::value>(dst, ld, src, stride, n, width, factor, z, dots); });
}

// dst[c * ld + i] = src[i * padded + c], for n rows of `width` columns, padded to whole vectors
void transpose_packed(float* dst, int64_t ld, const float* src, int n, int width) {
  const int64_t padded = round_up(width, kLanes);
  transpose_rows(dst, ld, n, width, [&](int i) { return src + i * padded; });
}

// weight[i] of tokens [at, at + n), in float32
EFFVIT_INLINE const float* load_weights(const Params& p, int64_t batch, int64_t at, int n, int64_t head, float* to) {
  if (!p.weight) return nullptr;
  const int64_t first = batch * p.weight_stride_b + at * p.weight_stride_l + head * p.weight_stride_h;
  for (int i = 0; i < n; ++i) to[i] = load_scalar(p.weight, p.weight_dtype, first + i * p.weight_stride_l);
  return to;
}

// From dots = phi(q).z: factor = scale / d, and slope = -1/d, 0 where d does not depend on the dot. `count` is the
// number of keys of the first row; it grows by `step` from row to row. slope may be null. Whole vectors are written.
EFFVIT_INLINE void normalizers(const Params& p, const float* dots, int n, int64_t count, int step, float* factor,
                               float* slope) {
  for (int i = 0; i < n; i += kLanes) {
    vf d = load(dots + i);
    vi varies = lanes_below(p.normalize == Normalize::kNone ? 0 : kLanes);
    switch (p.normalize) {
      case Normalize::kNone:
        d = set1(1.f);
        break;
      case Normalize::kSum:
        d = d + set1(p.eps);
        break;
      case Normalize::kMean:
        for (int j = 0; j < kLanes; ++j) d[j] += static_cast<float>(count + int64_t{i + j} * step) * p.eps;
        break;
      case Normalize::kClamp:
        varies = ~(d < set1(p.clamp_min));
        d = max(set1(p.clamp_min), d);
        break;
    }
    store(factor + i, set1(p.scale) / d);
    if (slope) store(slope + i, (vf)((vi)(set1(-1.f) / d) & varies));
  }
}

// scores[i][j] = 0 for j > i (upper false) or j < i (upper true), for rows [r0, r0 + rows) and columns [c0, c1).
// A masked score is 0, not absent: an infinity or a NaN in a row of values reaches every row of its block of kBlock.
EFFVIT_INLINE void mask_triangle(float* scores, int64_t ld, int r0, int rows, int c0, int c1, bool upper) {
  for (int i = 0; i < rows; ++i) {
    float* row = scores + i * ld - c0;
    if (upper) {
      for (int j = c0; j < std::min(c1, r0 + i); ++j) row[j] = 0.f;
    } else {
      for (int j = std::max(c0, r0 + i + 1); j < c1; ++j) row[j] = 0.f;
    }
  }
}

constexpr int kBlock = 16;  // rows of a triangular product that share their number of columns
static_assert(kBlock % kLanes == 0);

enum class Triangle { kFull, kLower, kUpper };

// c[m, n] += (a[m, k] bt[k, columns]) masked to a triangle, times d[columns, n]: attention within a pair of chunks.
// bt holds `columns` columns, padded to whole vectors with finite values. scores: kBlock rows of round_up(columns).
void add_scores_product(Triangle triangle, int m, int columns, int k, const float* a, int64_t lda, const float* bt,
                        int64_t ldb, const float* d, int64_t ldd, int n, float* scores, float* c, int64_t ldc) {
  for (int r = 0; r < m; r += kBlock) {
    const int rows = std::min(kBlock, m - r);
    const int first = triangle == Triangle::kUpper ? r : 0;
    const int last = triangle == Triangle::kLower ? std::min(r + rows, columns) : columns;
    const int padded = round_up(last - first, kLanes);
    gemm(rows, padded, k, a + r * lda, lda, bt + first, ldb, nullptr, scores, padded);
    if (triangle != Triangle::kFull) {
      mask_triangle(scores, padded, r, rows, first, last, triangle == Triangle::kUpper);
    }
    float* const to = c + r * ldc;
    gemm(rows, n, last - first, scores, padded, d + first * ldd, ldd, to, to, ldc);
  }
}

}  // namespace linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
