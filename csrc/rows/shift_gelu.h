// shift_gelu: I-ViT's GELU of integers, x times a sigmoid from shift exponentials.
#if !defined(EFFVIT_ROWS)  // for the bindings
#include "int_rows.h"

namespace effvit::ops {

struct shift_gelu : OpDefaults {
  static constexpr const char* kForward =
      "shift_gelu(x: ... C | integer; x0: int in -2147483647..-1, n: int in 4..30 = 23, bits: int in 2..16 = 8, "
      "half_bit: "
      "bool = True, safe_max: bool = True, multiplier: int in 0..2147483647 = 0, shift: int in 1..61 = 31, out_dtype: "
      "int in 3..6 = 3) -> out: ... C | out_dtype";
  static constexpr const char* kEmpty = "... C";

  static void check(const Call& c) { check_shift_exp(c); }

  static IntRowsParams<shift_gelu> params(const Call& c) {
    auto p = int_rows_of<shift_gelu>(c);
    p.exp = shift_exp_of(c), p.variant = p.exp.wide, p.bits = c.integer("bits");
    p.multiplier = c.integer("multiplier"), p.shift = c.integer("shift"), p.flags[0] = c.flag("safe_max");
    return p;
  }
};

}  // namespace effvit::ops

#else  // for the kernels: V is a vector of int32 on a CPU, an int32_t on a GPU

enum : int { kVariants = 2 };

template <int kWide>
struct Forward {
  static constexpr int kPasses = 1, kVectors = 0;
  static constexpr Reduce kReductions[kPasses] = {Reduce::kRange};
  static constexpr bool kKeeps = false, kTabulates = true, kAdds = false, kIsNorm = false;  // as int_math.h has it
  struct Row {
    int32_t top, bottom, low;  // from where x is counted; the smallest x; from where down the exponential is constant
    uint32_t of_top;  // the exponential of -top
    bool fits, narrow;  // products with sigmoids into 32 bits, and below 2^22
  };

  // The exponential of d > 0: the quotient is negative, and the result 2^31 - 1 where it would be more.
  EFFVIT_FN static uint32_t shift_exp_above(const ShiftExp& e, int64_t d) {
    const int64_t p = d + (d >> 1) - (d >> 4), x = e.x, q = (p + x - 1) / x, left = q + e.n;
    if (left > 32) return 0x7fffffff;
    const uint64_t a = static_cast<uint64_t>(2 * x - (q * x - p)) & (~uint64_t{0} << (~e.mask & 1)),
                   y = (a << left) >> 1;
    return y > 0x7fffffff ? 0x7fffffff : static_cast<uint32_t>(y);
  }

  template <int, class V>
  EFFVIT_FN static V term(const IntRowsData&, const Row&, V x) {
    return x;
  }
  template <int>
  EFFVIT_FN static void finish(const IntRowsData& p, Row& row, int64_t total, int32_t bottom) {
    row.top = static_cast<int32_t>(p.flags[0] && total < 0 ? 0 : total), row.bottom = bottom;
    row.low = lowest_of(p.exp, row.top);
    const int64_t size = total > -static_cast<int64_t>(bottom) ? total : -static_cast<int64_t>(bottom);
    row.fits = (size >> (32 - p.bits)) == 0, row.narrow = (size >> (23 - p.bits)) == 0;
    const int64_t d = -static_cast<int64_t>(row.top), limit = p.exp.limit;
    row.of_top = d > 0 ? shift_exp_above(p.exp, d)
                       : static_cast<uint32_t>(shift_exp<kWide>(p.exp, static_cast<int32_t>(d < -limit ? -limit : d)));
  }
  // Both exponentials are below 2^31, and e f at most 2^31 - 1, as f is rounded down.
  EFFVIT_FN static void prepare(IntRowsData&) {}
  template <class V>
  EFFVIT_FN static V map(const IntRowsData& p, const Row& row, V x, V, V, const V (&)[1]) {
    using U = Unsigned<V>;
    const auto of = [](int32_t y) { return splat<V>(static_cast<uint32_t>(y)); };
    const U e = (U)shift_exp<kWide>(p.exp, (V)((U)most(x, of(row.low)) - (U)of(row.top)));  // lanes beyond a row wrap
    const U f = reciprocal(least(e + row.of_top, splat<U>(0x7fffffff)));
    const U sigmoid = (e * f) >> static_cast<uint32_t>(32 - p.bits);
    const V y = row.fits ? (V)((U)x * sigmoid) : product(x, (V)sigmoid, -0x7fffffff - 1, 0x7fffffff);
    if (p.multiplier == 0) return least(most(y, of(p.low)), of(p.high));
    return rescale_all(p, y, row.narrow);
  }
};
#endif
