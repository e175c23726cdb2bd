// requantize: integers in steps of one scale in steps of another, by a multiplication and a shift.
#if !defined(EFFVIT_ROWS)  // for the bindings
#include "int_rows.h"

namespace effvit::ops {

struct requantize : OpDefaults {
  static constexpr const char* kForward =
      "requantize(x: ... C | integer, multiplier: C | int32 packed, shift: C | int32 packed, residual?: ... C | "
      "integer, "
      "residual_multiplier?: C | int32 packed, residual_shift?: C | int32 packed; bits: int in 2..32 = 8, out_dtype: "
      "int in 3..6 = 4) -> out: ... C | out_dtype";
  static constexpr const char* kEmpty = "... C";

  static void check(const Call& c) {
    c.check_together("residual", "residual_multiplier");
    c.check_together("residual", "residual_shift");
    check_integers(c, "multiplier", -0x7fffffff, 0x7fffffff);
    check_integers(c, "residual_multiplier", -0x7fffffff, 0x7fffffff);
    check_integers(c, "shift", 1, 61);
    check_integers(c, "residual_shift", 1, 61);
  }

  static IntRowsParams<requantize> params(const Call& c) {
    auto p = int_rows_of<requantize>(c, {"multiplier", "shift", "residual_multiplier", "residual_shift"});
    p.variant = c.given("residual");
    set_ends(p, c.integer("bits"));
    return p;
  }
};

}  // namespace effvit::ops

#else  // for the kernels: V is a vector of int32 on a CPU, an int32_t on a GPU

enum : int { kVariants = 2 };

template <int kResidual>
struct Forward {
  static constexpr int kPasses = 0, kScales = 0,
                       kVectors = kResidual != 0 ? 4 : 2;  // multiplier and shift of x, of the residual
  static constexpr Reduce kReductions[1] = {};
  static constexpr bool kKeeps = false, kTabulates = false, kAdds = false, kIsNorm = false;  // as int_math.h has it
  struct Row {};

  EFFVIT_FN static void prepare(IntRowsData&) {}
  template <class V>
  EFFVIT_FN static V map(const IntRowsData& p, const Row&, V x, V, V residual, const V (&v)[kVectors + 1]) {
    if constexpr (kResidual != 0) {
      return rescale_sum(x, v[0], shift_of(v[1]), residual, v[2], shift_of(v[3]), p.low, p.high);
    } else {
      return rescale(x, v[0], shift_of(v[1]), p.low, p.high);
    }
  }
};
#endif
