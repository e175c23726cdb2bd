// linear_attention on the CPU: its operands in bfloat16, where the ISA has products of them. Included by
// linear_attention_kernel.inl.h.
#pragma once

namespace effvit::cpu::EFFVIT_ISA_NAME {
namespace linear_attention_impl {

struct NoBf16Operands {
  NoBf16Operands(const Plan&, int64_t, Scratch&) {}
};

#if defined(EFFVIT_HAS_BF16_PRODUCTS)
// phi(src[i]) * weight[i] in bfloat16 with the rows in pairs, of 2 round_up(width, kLanes) elements with zeros behind
// the width, and rows of zeros up to the depth of a product. Null weight: 1. z, where given, takes the sum of the rows,
// not rounded.
template <FeatureMap F>
void pack_feature_pairs(BFloat16* dst, const BFloat16* src, int64_t stride, int n, int width, const float* weight,
                        float* z) {
  const int padded = round_up(width, kLanes);
  for (int c = 0; c < width; c += kLanes) {
    const int left = width - c;
    const auto at = [&](int i) __attribute__((always_inline)) {
      const BFloat16* from = src + i * stride + c;
      vf x = feature<F>(load_lanes(from, left));
      if (left < kLanes) x = first_lanes(x, left);
      return weight ? x * set1(weight[i]) : x;
    };
    vf total{};
    BFloat16* to = dst + 2 * c;
    const auto put = [&](vf even, vf odd) __attribute__((always_inline)) {
      if (z) total = kBf16Tiles<BFloat16> ? total + even + odd : total + (even + odd);
      const bool exact = !weight && (F == FeatureMap::kNone || F == FeatureMap::kRelu);
      store(reinterpret_cast<Word*>(to), (vf)(exact ? join_pairs(even, odd) : round_pairs(even, odd)));
      to += 2 * padded;
    };
    int i = 0;
    for (; i + 2 <= n; i += 2) put(at(i), at(i + 1));
    if (i < n) put(at(i), vf{}), i += 2;
    for (; i < round_up(n, kBf16Depth); i += 2) put(vf{}, vf{});
    if (z) add_compensated(z + c, z + padded + c, total);
  }
}
EFFVIT_INLINE void pack_feature_pairs(FeatureMap map, BFloat16* dst, const BFloat16* src, int64_t stride, int n,
                                      int width, const float* weight = nullptr, float* z = nullptr) {
  dispatch_map(map, [&](auto f) { pack_feature_pairs<decltype(f)::value>(dst, src, stride, n, width, weight, z); });
}

struct Bf16Operands {
  const Plan& plan;
  int K32, V32;  // head dims rounded up to the depth of a product on tiles
  // A chunk's rows [64, 32-multiple]; those whose transpose is multiplied with, in pairs [32, 2 Kp]; and the rows that
  // they are multiplied with, in pairs [32, 2 Vp]. A state's rows.
  BFloat16 *rows, *left_pairs, *right_pairs, *state_rows;
  // Per head of the unit: S as a right-hand side, [K32 / 2, 2 Vp], and S^T, [V32 / 2, 2 Kp].
  BFloat16 *states, *states_t;

  Bf16Operands(const Plan& cut, int64_t heads, Scratch& s) : plan(cut) {
    K32 = round_up(plan.K, 32), V32 = round_up(plan.V, 32);
    rows = s.take<BFloat16>(int64_t{kChunk} * std::max(K32, V32));
    left_pairs = s.take<BFloat16>(int64_t{plan.Kp} * kChunk);
    right_pairs = s.take<BFloat16>(int64_t{kChunk} * plan.Vp);
    state_rows = s.take<BFloat16>(int64_t{K32} * V32);
    states = s.take<BFloat16>(heads * K32 * plan.Vp);
    states_t = s.take<BFloat16>(heads * V32 * plan.Kp);
  }

  // The slot of a state, rounded, as a right-hand side of products over its rows and over its columns.
  void load_state(const float* slot, int64_t index, bool rows_too, bool columns_too) {
    for (int c = 0; c < K32; ++c) {
      BFloat16* to = state_rows + int64_t{c} * V32;
      const float* from = slot + int64_t{c} * plan.Vp;
      for (int e = 0; e < V32; e += kLanes) {  // the padding of a slot may hold 0 * inf: it stays out of the products
        const int left = std::max(0, std::min(kLanes, plan.V - e));
        store(to + e, c < plan.K && left > 0 ? first_lanes(load(from + e), left) : vf{});
      }
    }
    if (rows_too) {
      pack_rows(state(index), 2 * plan.Vp, K32, plan.Vp, [&](int c) { return state_rows + int64_t{c} * V32; });
    }
    if (columns_too) {
      pack_transposed(state_t(index), 2 * plan.Kp, plan.Kp, V32, [&](int c) { return state_rows + int64_t{c} * V32; });
    }
  }
  // left_pairs = rows of src[n, Kp] in pairs
  void load_left(const float* src, int n) {
    const int64_t ld = plan.Kp;
    for (int i = 0; i < n; i += 2) {
      const float* row = src + i * ld;
      for (int c = 0; c < plan.Kp; c += kLanes) {
        const vf odd = i + 1 < n ? load(row + ld + c) : vf{};
        store(reinterpret_cast<Word*>(left_pairs + i * ld + 2 * c), (vf)round_pairs(load(row + c), odd));
      }
    }
  }

  // right_pairs = n rows of values in pairs; or the n rows that `rows` holds, V32 elements each.
  void load_right(const BFloat16* values, int64_t stride, int n) {
    if (plan.V < plan.Vp) return pack_feature_pairs(FeatureMap::kNone, right_pairs, values, stride, n, plan.V);
    pack_rows(right_pairs, 2 * plan.Vp, n, plan.Vp, [&](int i) { return values + i * stride; });
  }
  void load_right(int n) {
    pack_rows(right_pairs, 2 * plan.Vp, n, plan.Vp, [&](int i) { return rows + int64_t{i} * V32; });
  }

  // slot += (rows in left_pairs)^T (rows in right_pairs), n rows.
  template <class F>
  EFFVIT_INLINE void add_outer(int n, float* slot, const F& ahead) {
    gemm_into(plan.K, plan.Vp, n, transposed(left_pairs, plan.Kp), right(right_pairs, plan.Vp),
              StoreC{slot, plan.Vp, true}, ahead);
  }
  // product[n, Kp] = rows[n, V32] S^T
  template <class F>
  EFFVIT_INLINE void times_state_t(int64_t index, int n, float* product, const F& ahead) {
    gemm_into(n, plan.Kp, plan.V, row_major(rows, V32), right(state_t(index), plan.Kp), StoreC{product, plan.Kp, false},
              ahead);
  }
  // Tokens to[n, V] = factor * rows[n, K32] S
  template <class F>
  EFFVIT_INLINE void times_state(int64_t index, int n, BFloat16* to, AtStride place, const float* factor,
                                 const F& ahead) {
    gemm_to_tokens(n, plan.V, plan.K, row_major(rows, K32), right(state(index), plan.Vp), to, place, factor, ahead);
  }

 private:
  BFloat16* state(int64_t index) const { return states + index * K32 * plan.Vp; }
  BFloat16* state_t(int64_t index) const { return states_t + index * V32 * plan.Kp; }
  ProductScope<BFloat16> scope_;
};
template <class T>
using OperandsOf = std::conditional_t<kBf16Products<T>, Bf16Operands, NoBf16Operands>;
#else
template <class T>
using OperandsOf = NoBf16Operands;
#endif

}  // namespace linear_attention_impl
}  // namespace effvit::cpu::EFFVIT_ISA_NAME
