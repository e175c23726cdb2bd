// shiftmax: I-ViT's softmax of integers.
#if !defined(EFFVIT_ROWS)  // for the bindings
#include "int_rows.h"

namespace effvit::ops {

struct shiftmax : OpDefaults {
  static constexpr const char* kForward =
      "shiftmax(x: ... C | integer; x0: int in -2147483647..-1, n: int in 4..30 = 15, bits: int in 2..16 = 8, "
      "half_bit: "
      "bool = True, out_dtype: int in 3..6 = 4) -> out: ... C | out_dtype";
  static constexpr const char* kEmpty = "... C";

  static void check(const Call& c) {
    check_shift_exp(c);
    const char* const names[] = {"int32", "int8", "uint8", "int16"};
    const int most[] = {16, 8, 9, 16}, type = c.integer("out_dtype") - 3;
    effvit::check(c.integer("bits") <= most[type], c.op(), "bits must be at most ", most[type], " with out_dtype ",
                  names[type], ", got ", c.integer("bits"));
  }

  static IntRowsParams<shiftmax> params(const Call& c) {
    auto p = int_rows_of<shiftmax>(c);
    p.exp = shift_exp_of(c), p.variant = p.exp.wide, p.bits = c.integer("bits");
    return p;
  }
};

}  // namespace effvit::ops

#else  // for the kernels: V is a vector of int32 on a CPU, an int32_t on a GPU

enum : int { kVariants = 2 };

template <int kWide>
struct Forward {
  static constexpr int kPasses = 2, kVectors = 0;
  static constexpr Reduce kReductions[kPasses] = {Reduce::kMax, Reduce::kSaturating};
  static constexpr bool kKeeps = true, kTabulates = false, kAdds = false, kIsNorm = false;  // as int_math.h has it
  struct Row {
    int32_t top, low, f;
  };

  template <int kPass, class V>
  EFFVIT_FN static V term(const IntRowsData& p, const Row& row, V x) {
    if constexpr (kPass == 0) {
      return x;
    } else {
      using U = Unsigned<V>;  // as lanes beyond a row may wrap
      const V low = splat<V>(static_cast<uint32_t>(row.low));
      return shift_exp<kWide>(p.exp, (V)((U)most(x, low) - splat<U>(static_cast<uint32_t>(row.top))));
    }
  }
  template <int kPass>
  EFFVIT_FN static void finish(const IntRowsData& p, Row& row, int64_t total, int32_t) {
    if constexpr (kPass == 0) {
      row.top = static_cast<int32_t>(total), row.low = lowest_of(p.exp, row.top);
    } else {
      row.f = 0x7fffffff / static_cast<int32_t>(total);
    }
  }
  // e f <= 2^31 - 1: f is rounded down, and 1 where the sum was cut off.
  EFFVIT_FN static void prepare(IntRowsData&) {}
  template <class V>
  EFFVIT_FN static V map(const IntRowsData& p, const Row& row, V, V kept, V, const V (&)[1]) {
    using U = Unsigned<V>;
    return (V)(((U)kept * static_cast<uint32_t>(row.f)) >> static_cast<uint32_t>(32 - p.bits));
  }
};
#endif
