// The functor of LayerNorms of integers, for kernels: V is a vector of int32 on a CPU, an int32_t on a GPU.

template <int kRescales>
struct LayerNorm {
  static constexpr int kPasses = 2, kVectors = kRescales != 0 ? 4 : 2;  // bias, offset, multiplier, shift
  static constexpr int kScales = 4;  // multiplier and shift of x, of the residual, where they are added
  static constexpr Reduce kReductions[kPasses] = {Reduce::kSum, Reduce::kSquares};
  static constexpr bool kKeeps = true, kTabulates = false, kIsNorm = true;  // as int_math.h has it
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
  EFFVIT_FN static V term(const IntRowsData&, const Row& row, V x) {
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
    uint64_t k = exact_root(v);
    if (k != 0) return k;
    k = 1;
    while (k < 0xffffffff && k * k < v) k *= 2;
    for (;;) {
      const uint64_t next = (k + quotient(v, k)) / 2;
      if (next >= k) return k;
      k = next;
    }
  }
  // Ten of Newton's steps from 2^16. For 2^18 <= v <= 2^42 they end at r = floor(sqrt(v)) unless v + 1 is a square,
  // when they may end at r + 1: with t = sqrt(v) a step without its rounding down makes of t (1 + e)
  // t (1 + e^2 / (2 + 2 e)). From 2^16 <= 128 t ten of them leave e < 3e-7, from 2^16 <= 64 t, which is where v >=
  // 2^20, or from below t, which the first step makes 16.1 t at most, e < 3e-14. Both are above t by less than 1 / (2 t
  // + 2), half of what t is below r + 1, so rounded down they are r; and a step from r, once there, goes to r.
  EFFVIT_FN static uint64_t newton(uint64_t v) {
    const uint64_t root = v >> 18 != 0 && v <= uint64_t{1} << 42 ? exact_root(v) : 0;
    if (root != 0 && v + 1 != (root + 1) * (root + 1)) return root;
    uint64_t k = 1 << 16;
    for (int i = 0; i < 10; ++i) {
      const uint64_t next = (k + quotient(v, k)) >> 1;
      if (next == k) break;  // and so would all that follow
      k = next;
    }
    return k;
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
      uint64_t k;
      if (p.flags[0]) {
        k = v == 0 ? 1 : square_root(v);
      } else {  // Newton's steps are never below the root, so |x - mean| <= k here too
        k = newton(v);
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
    if (p.vectors[1] == nullptr) {
      if constexpr (kRescales != 0) return rescale(y, vectors[2], shift_of(vectors[3]), p.low, p.high);
    } else {
      if constexpr (kRescales != 0) y = rescale(y, vectors[2], shift_of(vectors[3]), -0x7fffffff - 1, 0x7fffffff);
      y = saturating_sum(y, vectors[1]);
    }
    return least(most(y, of(p.low)), of(p.high));
  }
};
