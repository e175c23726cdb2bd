// int_layer_norm: I-ViT's LayerNorm of integers, by an integer square root.
#if !defined(EFFVIT_ROWS)  // for the bindings
#include "int_rows.h"

namespace effvit::ops {

struct int_layer_norm : OpDefaults {
  static constexpr const char* kForward =
      "int_layer_norm(x: ... C | int32, bias?: C | int32 packed, multiplier?: C | int32 packed, shift?: C | int32 "
      "packed; exact: bool = False, truncate: bool = False, out_dtype: int in 3..6 = 3) -> out: ... C | out_dtype";
  static constexpr const char* kEmpty = "... C";

  static void check(const Call& c) {
    c.check_together("multiplier", "shift");
    check_integers(c, "multiplier", -0x7fffffff, 0x7fffffff);
    check_integers(c, "shift", 1, 61);
  }

  static IntRowsParams<int_layer_norm> params(const Call& c) {
    auto p = int_rows_of<int_layer_norm>(c, {"bias", "multiplier", "shift"});
    p.flags[0] = c.flag("exact"), p.flags[1] = c.flag("truncate"), p.variant = c.given("multiplier");
    return p;
  }
};

}  // namespace effvit::ops

#else  // for the kernels: V is a vector of int32 on a CPU, an int32_t on a GPU

enum : int { kVariants = 2 };

template <int kRescales>
struct Forward {
  static constexpr int kPasses = 2, kVectors = kRescales != 0 ? 3 : 1;  // bias, multiplier, shift
  static constexpr Reduce kReductions[kPasses] = {Reduce::kSum, Reduce::kSquares};
  static constexpr bool kKeeps = true, kTabulates = false;  // the last pass's terms; results by x of a row
  static constexpr int64_t kFurthest = 46340;  // from the mean: its square is below 2^31
  struct Row {
    int32_t mean, low, high, f;
  };

  // x - mean, within kFurthest.
  template <class V>
  EFFVIT_FN static V centered(const Row& row, V x) {
    const auto of = [](int32_t y) { return splat<V>(static_cast<uint32_t>(y)); };
    return least(most(x, of(row.low)), of(row.high)) - of(row.mean);
  }
  template <int kPass, class V>
  EFFVIT_FN static V term(const IntRowsData&, const Row& row, V x, V) {
    if constexpr (kPass == 0) {
      return x;
    } else {
      return centered(row, x);
    }
  }
  // Divisions of 32 bits take much less time.
  EFFVIT_FN static uint64_t quotient(uint64_t a, uint64_t b) {
    return (a | b) >> 32 ? a / b : static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  }
  // floor(sqrt(v)), from above.
  EFFVIT_FN static uint64_t square_root(uint64_t v) {
    uint64_t k = 1;
    while (k < 0xffffffff && k * k < v) k *= 2;
    for (;;) {
      const uint64_t next = (k + quotient(v, k)) / 2;
      if (next >= k) return k;
      k = next;
    }
  }
  template <int kPass>
  EFFVIT_FN static void finish(const IntRowsData& p, Row& row, int64_t total, int32_t) {
    if constexpr (kPass == 0) {
      const uint64_t columns = static_cast<uint64_t>(p.columns);
      const uint64_t size = static_cast<uint64_t>(total < 0 ? -total : total), whole = quotient(size, columns);
      const uint64_t rest = 2 * (size - whole * columns);
      const bool up = !p.flags[1] && (rest > columns || (rest == columns && (whole & 1) != 0));
      const int64_t rounded = static_cast<int64_t>(whole) + (up ? 1 : 0), mean = total < 0 ? -rounded : rounded;
      const int64_t low = mean - kFurthest, high = mean + kFurthest;
      row.mean = static_cast<int32_t>(mean);
      row.low = static_cast<int32_t>(low < -0x80000000ll ? -0x80000000ll : low);
      row.high = static_cast<int32_t>(high > 0x7fffffff ? 0x7fffffff : high);
    } else {
      const uint64_t v = static_cast<uint64_t>(total);
      uint64_t k = 1 << 16;
      if (p.flags[0]) {
        k = v == 0 ? 1 : square_root(v);
      } else {  // Newton's steps are never below the root, so |x - mean| <= k here too
        for (int i = 0; i < 10; ++i) {
          const uint64_t next = (k + quotient(v, k)) >> 1;
          if (next == k) break;  // and so would all that follow
          k = next;
        }
      }
      row.f = k > 0x7fffffff ? 0 : static_cast<int32_t>(0x7fffffff / k);
    }
  }
  // Where the host can see it: whether no sum with the bias saturates, as y is at most 2^30.
  EFFVIT_FN static void prepare(IntRowsData& p) {
    const int32_t* const bias = p.vectors[0];
    bool small = true;
    for (int64_t i = 0; bias && i < p.columns; ++i) small = small && bias[i] >= -(1 << 30) && bias[i] <= 1 << 30;
    p.flags[2] = small;
  }
  // |y f| <= k f <= 2^31 - 1.
  template <class V>
  EFFVIT_FN static V map(const IntRowsData& p, const Row& row, V, V kept, V, const V (&vectors)[kVectors + 1]) {
    using U = Unsigned<V>;
    const auto of = [](int32_t y) { return splat<V>(static_cast<uint32_t>(y)); };
    V y = (V)((U)kept * static_cast<uint32_t>(row.f));  // unsigned: lanes beyond a row may wrap
    if (p.flags[1]) y = (V)((U)y + ((U)y >> 31u));  // towards 0
    y = p.flags[2] ? (V)((U)(y >> 1) + (U)vectors[0]) : saturating_sum((V)(y >> 1), vectors[0]);
    if constexpr (kRescales != 0) {
      return rescale(y, vectors[1], least(most(vectors[2], of(1)), of(61)), p.low, p.high);
    } else {
      return least(most(y, of(p.low)), of(p.high));
    }
  }
};
#endif
